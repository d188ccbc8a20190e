"""Detect the model family and the components of a single-file checkpoint, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypergen.errors import ModelError
from hypergen.model_families import FAMILIES, SingleFile, Variant

_PREFIX = "model.diffusion_model."


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint file.

    Attributes:
        pipelines: pipeline classes that can load it.
        components: components whose weights are in it.
        usual_source: hub model whose configuration fits most such files.
    """

    pipelines: tuple[str, ...]
    components: frozenset[str]
    usual_source: str


def read_checkpoint(header: bytes, name: str) -> Checkpoint:
    """Detect a checkpoint by the names and shapes of its tensors.

    Args:
        header: JSON header of the safetensors file.

    Raises:
        ModelError: the file has no denoiser of a supported family; it is a LoRA, for example.
    """
    tensors: dict[str, Any] = json.loads(header)
    shapes = {
        tensor.removeprefix(_PREFIX): tuple(entry["shape"])
        for tensor, entry in tensors.items()
        if tensor != "__metadata__"
    }
    if any("lora" in tensor.lower() for tensor in shapes):
        raise ModelError(f"{name} is a LoRA, not a model; serve its model, with this file as --lora.")
    if any(tensor.startswith(("control_model.", "controlnet_cond_embedding.")) for tensor in shapes):
        raise ModelError(
            f"{name} is a ControlNet, not a model; serve its model, with a folder of the ControlNet as "
            "--controlnet."
        )
    family = next(
        (
            (spec, layout)
            for spec in FAMILIES.values()
            if (layout := spec.single_file) and any(mark in shapes for mark in layout.marks)
        ),
        None,
    )
    if family is None:
        supported = ", ".join(spec.name for spec in FAMILIES.values() if spec.single_file)
        raise ModelError(
            f"{name} has no denoiser of a supported family; supported are checkpoints of {supported}."
        )
    spec, layout = family
    components = {
        component
        for tensor in shapes
        for prefix, component in layout.components.items()
        if tensor.startswith(prefix)
    }
    variant = next(variant for variant in layout.variants if _matches(variant, layout, shapes))
    return Checkpoint(
        variant.pipelines or spec.pipelines, frozenset({layout.denoiser, *components}), variant.source
    )


def _matches(variant: Variant, layout: SingleFile, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    # The input width of cross attention's keys is the width of the prompt embeddings.
    text_width = next((shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), 0)
    in_channels = next(shapes[mark][1:2] for mark in layout.marks if mark in shapes)
    return (
        (not variant.prefixes or any(tensor.startswith(variant.prefixes) for tensor in shapes))
        and variant.text_width in (None, text_width)
        and (variant.in_channels is None or in_channels == (variant.in_channels,))
    )
