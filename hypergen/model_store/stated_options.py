"""What a checkpoint file states of itself: tensors that are markers, and the metadata in its header."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from hypergen.errors import ModelError
from hypergen.model_families import SingleFile
from hypergen.served_model_config import ModelOptions

logger = logging.getLogger(__name__)

_PREDICTIONS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "sample": "sample",
}
_FLAGS = {"true": True, "false": False, "1": True, "0": False}


def stated_options(
    layout: SingleFile, tensors: Iterable[str], metadata: Mapping[str, Any], name: str
) -> ModelOptions:
    """The options that a file states. Markers win over metadata, which merges often copy from another file.

    Raises:
        ModelError: it states something that is not understood, or not supported.
    """
    if not layout.markers:  # flow matching predicts nothing else
        return ModelOptions()
    stated = _metadata_options(metadata, name)
    if layout.default_clip_skip != 1:  # trainings of these models take no other layer, whatever they write
        stated.pop("clip_skip", None)
    marked = {
        field: value
        for tensor in tensors
        if tensor in layout.markers
        for field, value in layout.markers[tensor].items()
    }
    for field, value in marked.items():
        if stated.get(field, value) != value:
            logger.warning("%s: its tensors state %s %s, its metadata another.", name, field, value)
    return ModelOptions.model_validate({**stated, **marked})


def _metadata_options(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Fields of https://github.com/Stability-AI/ModelSpec and kohya-ss/sd-scripts that change images."""
    options: dict[str, Any] = {}
    if (text := _text(metadata, "modelspec.prediction_type")) is not None:
        if text.lower() not in _PREDICTIONS:
            raise _unknown(name, "modelspec.prediction_type", text)
        options["prediction_type"] = _PREDICTIONS[text.lower()]
    elif _text(metadata, "modelspec.architecture") == "stable-diffusion-v2-768-v":
        options["prediction_type"] = "v_prediction"
    elif _text(metadata, "modelspec.architecture") == "stable-diffusion-v2-512":
        options["prediction_type"] = "epsilon"
    if _flag(metadata, "ss_v_parameterization", name):
        options["prediction_type"] = "v_prediction"
    if _flag(metadata, "ss_zero_terminal_snr", name):
        options["zero_terminal_snr"] = True
    if (text := _text(metadata, "modelspec.encoder_layer")) is not None:
        if not (text.isdecimal() and 1 <= int(text) <= 12):
            raise _unknown(name, "modelspec.encoder_layer", text)
        options["clip_skip"] = int(text)
    if (text := _text(metadata, "modelspec.timestep_range")) is not None:
        numbers = [part.strip() for part in text.split(",")]
        if numbers not in (["0", "1000"], ["0", "999"]):
            raise _unknown(name, "modelspec.timestep_range", text)
    return options


def _text(metadata: Mapping[str, Any], field: str) -> str | None:
    value = metadata.get(field)
    return None if value in (None, "", "None") else str(value)


def _flag(metadata: Mapping[str, Any], field: str, name: str) -> bool:
    text = _text(metadata, field)
    if text is None:
        return False
    if text.lower() not in _FLAGS:
        raise _unknown(name, field, text)
    return _FLAGS[text.lower()]


def _unknown(name: str, field: str, text: str) -> ModelError:
    return ModelError(
        f"{name}: its metadata has {field} {text[:100]!r}, which is not supported; serve it as a folder in "
        "diffusers' layout."
    )
