"""Detect the model family, the components and the options of a single-file checkpoint, without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hypergen.errors import ModelError
from hypergen.model_families import EDM_MARKERS, FAMILIES, FamilySpec, SingleFile, Variant
from hypergen.model_store.stated_options import stated_options
from hypergen.served_model_config import ModelOptions

PREFIX = "model.diffusion_model."
METADATA = "__metadata__"

# Start of a tensor name -> what the file is. None of them is served as a single file.
_OTHERS = {
    "single_stream_modulation.": "FLUX.2",
    "double_stream_modulation_img.": "FLUX.2",
    "distilled_guidance_layer.": "Chroma",
    "txt_norm.": "Qwen-Image",
    "txt_in.text_norm.": "Qwen-Image",
    "cap_pad_token": "Z-Image",
    "cap_embedder.": "Lumina 2",
    "double_layers.": "AuraFlow",
    "blocks.0.cross_attn.q_linear.": "HunyuanDiT or PixArt",
    "double_stream_blocks.": "HiDream",
    "caption_projection.0.": "HiDream",
    "head.modulation": "Wan",
    "clf.1.": "Stable Cascade",
    "txt_in.individual_token_refiner.": "HunyuanVideo",
    "input_blocks.1.0.time_stack.": "Stable Video Diffusion",
    "time_stack.": "Stable Video Diffusion",
    "edm_vpred.": "CosXL",
}
# Start of a tensor name -> what a file without a denoiser is, and how it is used.
_PARTS = {
    "decoder.up": "a VAE, not a model; give it as `vae` in a served-model file",
    "first_stage_model.decoder.": "a VAE, not a model; give it as `vae` in a served-model file",
    "emb_params": "a textual inversion, not a model",
    "clip_l": "a textual inversion, not a model",
    "text_model.": "a text encoder, not a model",
    "encoder.block.": "a text encoder, not a model",
}
_LORA_PARTS = ("lora", "lycoris_", ".hada_w", ".lokr_w")
# End of a tensor name -> the format of the weights, which is not read.
_FORMATS = {
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".qweight": "SVDQuant or GPTQ",
    ".wscales": "SVDQuant",
    ".weight_scale_2": "NVFP4",
    ".weight_codebook": "W4A8",
}
# Formats of a quantized layer in ComfyUI's notes that are a scale times 8-bit floating point numbers.
SCALED_FORMATS = ("float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint file.

    Attributes:
        family: name of its family.
        pipelines: pipeline classes that can load it.
        components: component -> names of its tensors in the file. The others are markers or unknown.
        variants: those that fit; several where no tensor tells them apart.
        in_channels: input channels of the denoiser; of transformers, of one patch.
        is_original: the denoiser has the names of the original code, not diffusers'.
        options: what the file states of itself.
    """

    family: str
    pipelines: tuple[str, ...]
    components: Mapping[str, tuple[str, ...]]
    variants: tuple[Variant, ...]
    in_channels: int
    is_original: bool
    options: ModelOptions

    @property
    def layout(self) -> SingleFile:
        layout = FAMILIES[self.family].single_file
        assert layout is not None
        return layout

    def usual_source(self, name: str, given: ModelOptions) -> str:
        """The hub model whose configuration fits most such files.

        Args:
            name: of the file, for messages.
            given: options of its served-model file, which win over those that the file states.

        Raises:
            ModelError: it depends on a prediction type that neither states.
        """
        stated = self.options.overridden_by(given).prediction_type
        source = next((v.source for v in self.variants if v.prediction_type in (None, stated)), None)
        if source is None:
            choices = " or ".join(f"{v.prediction_type} ({v.source})" for v in self.variants)
            raise ModelError(
                f"{name} does not state its prediction type, which its tensors do not tell; set "
                f"prediction_type in a served-model file: {choices}."
            )
        return source


def read_checkpoint(header: bytes, name: str) -> Checkpoint:
    """Detect a checkpoint by the names and shapes of its tensors.

    Args:
        header: JSON header of the safetensors file.

    Raises:
        ModelError: the file has no denoiser of a supported family; it is a LoRA, for example.
    """
    tensors: dict[str, Any] = json.loads(header)
    metadata = tensors.pop(METADATA, None) or {}
    names = {tensor: tensor.removeprefix(PREFIX) for tensor in tensors}
    shapes = {short: tuple(tensors[tensor]["shape"]) for tensor, short in names.items()}
    _refuse_other_files(shapes, name)
    _refuse_formats(tensors, metadata, name)
    spec, layout = _find_family(shapes, name)
    in_channels = next((shapes[layer][1] for layer in layout.first_layers if layer in shapes), 0)
    _check_edm_markers(shapes, in_channels, name)
    variants = _find_variants(layout, shapes, in_channels, name)
    return Checkpoint(
        family=spec.name,
        pipelines=variants[0].pipelines or spec.pipelines,
        components=_split(tensors, layout),
        variants=variants,
        in_channels=in_channels,
        is_original=layout.marks[0] in shapes,
        options=stated_options(layout, tensors, metadata, name),
    )


def is_lora(tensors: Iterable[str]) -> bool:
    """Whether a file with these tensors is a LoRA, or another change of a model's weights."""
    return any(part in tensor.lower() for tensor in tensors for part in _LORA_PARTS)


def _refuse_other_files(shapes: Mapping[str, Any], name: str) -> None:
    if is_lora(shapes):
        raise ModelError(f"{name} is a LoRA, not a model; serve its model, with this file as --lora.")
    if any(tensor.startswith(("control_model.", "controlnet_cond_embedding.")) for tensor in shapes):
        raise ModelError(
            f"{name} is a ControlNet, not a model; serve its model, with a folder of the ControlNet as "
            "--controlnet."
        )
    for start, model in _OTHERS.items():
        tensor = next((tensor for tensor in shapes if tensor.startswith(start)), None)
        if tensor is not None:
            raise ModelError(
                f"{name} is a checkpoint of {model} (it has '{tensor}'), which is not served from a single "
                "file; serve the model as a folder in diffusers' layout or by its hub id."
            )


def _refuse_formats(tensors: Mapping[str, Any], metadata: Mapping[str, Any], name: str) -> None:
    for end, quantization in _FORMATS.items():
        if (tensor := next((tensor for tensor in tensors if end in tensor), None)) is not None:
            raise _format_error(name, quantization, tensor)
    for tensor, entry in tensors.items():
        if entry["dtype"] in ("I8", "U8", "I4", "U4") and tensor.endswith(".weight"):
            raise _format_error(name, f"integers ({entry['dtype']})", tensor)
    layers: dict[str, Any] = _json_object(metadata.get("_quantization_metadata")).get("layers", {})
    for layer, note in layers.items():
        if note.get("format") not in SCALED_FORMATS:
            raise _format_error(name, str(note.get("format")), layer)


def _format_error(name: str, quantization: str, tensor: str) -> ModelError:
    return ModelError(
        f"{name} has weights in the format {quantization} ('{tensor}'), which is not read; serve the file "
        "with 16-bit weights, if need be with --quantization."
    )


def _json_object(text: Any) -> dict[str, Any]:
    try:
        value = json.loads(text) if isinstance(text, str) else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _find_family(shapes: Mapping[str, Any], name: str) -> tuple[FamilySpec, SingleFile]:
    for spec in FAMILIES.values():
        if (layout := spec.single_file) and any(mark in shapes for mark in layout.marks):
            return spec, layout
    for start, part in _PARTS.items():
        if any(tensor.startswith(start) for tensor in shapes):
            raise ModelError(f"{name} is {part}.")
    supported = ", ".join(spec.name for spec in FAMILIES.values() if spec.single_file)
    first = next(iter(shapes), "no tensors")
    raise ModelError(
        f"{name} has no denoiser of a supported family (its first tensor is '{first}'); supported are "
        f"checkpoints of {supported}."
    )


def _find_variants(
    layout: SingleFile, shapes: Mapping[str, tuple[int, ...]], in_channels: int, name: str
) -> tuple[Variant, ...]:
    # The input width of cross attention's keys is the width of the prompt embeddings.
    text_width = next((shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), 0)
    fitting = [
        variant
        for variant in layout.variants
        if (not variant.prefixes or any(tensor.startswith(variant.prefixes) for tensor in shapes))
        and variant.text_width in (None, text_width)
        and variant.in_channels in (None, in_channels)
    ]
    first = fitting[0]
    if first.unsupported:
        layer = next(layer for layer in layout.first_layers if layer in shapes)
        raise ModelError(
            f"{name} is a checkpoint of {first.unsupported} ('{layer}' has {in_channels} input channels), "
            "which is not served."
        )
    return (first,) if first.prediction_type is None else tuple(v for v in fitting if v.prediction_type)


def _check_edm_markers(shapes: Mapping[str, tuple[int, ...]], in_channels: int, name: str) -> None:
    found = [marker for marker in EDM_MARKERS if marker in shapes]
    for marker in EDM_MARKERS if found else ():
        if marker not in shapes:
            raise ModelError(f"{name}: the tensor '{marker}' is missing, but '{found[0]}' is in the file.")
        if math.prod(shapes[marker]) != in_channels:
            raise ModelError(
                f"{name}: the tensor '{marker}' has a shape of {list(shapes[marker])}; it must have "
                f"{in_channels} values."
            )


def _split(tensors: Iterable[str], layout: SingleFile) -> dict[str, tuple[str, ...]]:
    """Component -> names of its tensors."""
    names = [name for name in tensors if name not in layout.markers]
    has_prefix = any(name.startswith(PREFIX) for name in names)
    components: dict[str, list[str]] = {}
    for name in names:
        component = next((c for prefix, c in layout.components.items() if name.startswith(prefix)), None)
        if component is None and (name.startswith(PREFIX) or not has_prefix):
            component = layout.denoiser
        if component is not None:
            components.setdefault(component, []).append(name)
    return {component: tuple(names) for component, names in components.items()}
