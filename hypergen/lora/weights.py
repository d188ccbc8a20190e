"""Weights: from a LoRA file, as downloaded, to checked matrices for the layers of a loaded pipeline.

Nothing here touches the pipeline: a file that does not fit is refused before anything is applied.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from torch import Tensor, nn

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

# Under this key diffusers writes the settings of an adapter into the header of its file.
_SETTINGS = "lora_adapter_metadata"
_PARTS = re.compile(r"(?P<layer>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.weight)?")
# How the two factors are called where an `alpha` stands beside them.
_FACTORS = (("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora.down", "lora.up"))


class IncompatibleLoraError(Exception):
    """A file that is no LoRA for this model. The message is for the client."""


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """What a LoRA adds to one layer: `up(down(x))`, its alpha already in `up`.

    Attributes:
        down: shape (rank, in), and of a convolution (rank, in, kh, kw).
        up: shape (out, rank).
        magnitude: of each output, shape (out,): the layer is a DoRA (Liu et al. 2024,
            https://arxiv.org/abs/2402.09353).
    """

    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes


class Lora:
    """A loaded LoRA; the states that use it keep it alive, whatever else is loaded meanwhile."""

    _numbers = itertools.count()

    def __init__(self, layers: dict[str, LayerWeights]) -> None:
        self.layers = layers
        self.hooked = False
        self.number = next(self._numbers)  # never given twice, as a key for what was made with it
        self.changes_text_encoder = any(name.startswith("text_encoder") for name in layers)
        self.nbytes = sum(weights.nbytes for weights in layers.values())


def read_weights(path: Path, pipeline: Any, max_bytes: float) -> dict[str, LayerWeights]:
    """The weights of a file by layer: "unet.mid_block.attentions.0.proj_in", "text_encoder.encoder...".

    Raises:
        IncompatibleLoraError: the file is damaged, no LoRA, or one for another model.
    """
    data = _read_file(path, max_bytes)
    try:
        state_dict = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        settings = json.loads(header.get(_SETTINGS) or "{}")
        _fold_alphas(state_dict)
        state_dict = _convert(state_dict, pipeline)
        weights = dict(_layers(state_dict, settings, pipeline))
    except IncompatibleLoraError:
        raise
    except Exception as error:  # a stranger's file may break the libraries that read it in any way
        logger.warning("A LoRA file cannot be read.", exc_info=error)
        raise IncompatibleLoraError("is damaged, or of a layout that is not known") from None
    if not weights:
        raise IncompatibleLoraError("holds no LoRA for this model")
    return weights


def _read_file(path: Path, max_bytes: float) -> bytes:
    """The whole file, checked through one descriptor, so that what was checked is what is read."""
    try:
        descriptor = os.open(path.resolve(strict=True), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, RuntimeError):
        raise IncompatibleLoraError("cannot be read") from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise IncompatibleLoraError("cannot be read")
        if status.st_size > max_bytes:
            raise IncompatibleLoraError(f"is larger than {max_bytes / 1e6:.0f} MB")
        return file.read()


def _fold_alphas(state_dict: StateDict) -> None:
    """Multiply alpha / rank into the up factors; alphas that converters look for stay, as 1 x rank."""
    if any("dora_scale" in key for key in state_dict):
        raise IncompatibleLoraError("is a DoRA in Kohya's layout; DoRA is read in the layout of PEFT")
    for key in [key for key in state_dict if key.endswith(".alpha")]:
        name = key.removesuffix(".alpha")
        for down, up in _FACTORS:
            if f"{name}.{down}.weight" in state_dict:
                rank = state_dict[f"{name}.{down}.weight"].shape[0]
                alpha = float(state_dict.pop(key))
                factor = state_dict[f"{name}.{up}.weight"].to(torch.float32)
                state_dict[f"{name}.{up}.weight"] = factor * (alpha / rank)
                if down == "lora_down":
                    state_dict[key] = torch.tensor(float(rank))


def _convert(state_dict: StateDict, pipeline: Any) -> StateDict:
    """Names as diffusers and PEFT have them: component, layer, `lora_A` or `lora_B`."""
    # SDXL's files may count blocks as the original code does; the UNet's configuration says how many.
    sdxl = hasattr(pipeline, "unet") and hasattr(pipeline, "text_encoder_2")
    options: dict[str, Any] = {"unet_config": pipeline.unet.config} if sdxl else {}
    converted = pipeline.lora_state_dict(state_dict, use_safetensors=True, **options)
    return converted[0] if isinstance(converted, tuple) else converted


def _layers(
    state_dict: StateDict, settings: dict[str, Any], pipeline: Any
) -> Iterator[tuple[str, LayerWeights]]:
    left = set(state_dict)
    for component in pipeline._lora_loadable_modules:
        prefix = f"{component}."
        part = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        if not part:
            continue
        left -= {prefix + key for key in part}
        module = getattr(pipeline, component, None)
        if module is None:
            raise IncompatibleLoraError("holds no LoRA for this model")
        if component.startswith("text_encoder"):
            part = convert_state_dict_to_peft(convert_state_dict_to_diffusers(part))
            if not hasattr(module, "text_model"):
                part = {key.removeprefix("text_model."): value for key, value in part.items()}
        elif not any("lora_A" in key for key in part):
            part = convert_unet_state_dict_to_peft(part)
        own = {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}
        for name, weights in _fit(part, own, module):
            yield prefix + name, weights
    if left:
        raise IncompatibleLoraError("holds no LoRA for this model")


def _fit(
    state_dict: StateDict, settings: dict[str, Any], module: nn.Module
) -> Iterator[tuple[str, LayerWeights]]:
    """Compare each layer's factors with the layer."""
    layers = dict(module.named_modules())
    parts: defaultdict[str, StateDict] = defaultdict(dict)
    for key, tensor in state_dict.items():
        match = _PARTS.fullmatch(key)
        if match is None:
            raise IncompatibleLoraError("trains more than plain LoRA layers")
        parts[match["layer"]][match["part"]] = tensor
    for name, part in parts.items():
        layer = layers.get(name)
        if layer is None:
            raise IncompatibleLoraError("is for another model: it names layers that this one does not have")
        yield name, _fit_layer(layer, part, _scale(settings, name, part["lora_A"].shape[0]))


def _fit_layer(layer: nn.Module, part: StateDict, scale: float) -> LayerWeights:
    down, up, magnitude = part["lora_A"], part["lora_B"], part.get("lora_magnitude_vector")
    if isinstance(layer, nn.Linear):
        inside, window = layer.in_features, (1, 1)
    elif isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
        inside, window = layer.in_channels, layer.kernel_size
    else:
        raise IncompatibleLoraError("trains layers of a kind that LoRAs are not served for")
    rank, out = down.shape[0], layer.weight.shape[0]
    if down.numel() != rank * inside * window[0] * window[1] or up.numel() != out * rank or not rank:
        raise IncompatibleLoraError("is for another model: the shapes of its layers do not fit")
    if down.dim() == 4 and down.shape[2:] != window:
        raise IncompatibleLoraError("is for another model: the shapes of its layers do not fit")
    like = layer.weight
    weights = LayerWeights(
        # One by one is a product of matrices, in a convolution too.
        (down.reshape(rank, inside) if window == (1, 1) else down.reshape(rank, inside, *window)).to(like),
        (up.reshape(out, rank).to(torch.float32) * scale).to(like),
        None if magnitude is None else magnitude.reshape(out).to(like),
    )
    tensors = [weights.down, weights.up, *([] if magnitude is None else [weights.magnitude])]
    if not all(torch.isfinite(tensor).all() for tensor in tensors if tensor is not None):
        raise IncompatibleLoraError("holds numbers that are not finite")
    return weights


def _scale(settings: dict[str, Any], name: str, rank: int) -> float:
    """alpha / rank of a layer, as PEFT's settings say; without settings alpha is the rank."""
    alpha = settings.get("lora_alpha")
    for pattern, value in settings.get("alpha_pattern", {}).items():
        with suppress(re.error):
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                alpha = value
                break
    if alpha is None:
        return 1.0
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)
