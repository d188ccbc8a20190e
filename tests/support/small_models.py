"""Small models with random weights: real modules and files, without downloads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from tests.support.random_models import RANDOM_MODELS, SMALL_VAE, bytewise_tokenizer, letterwise_tokenizer

Prediction = Literal["epsilon", "v_prediction"]


def save_sd(folder: Path, prediction_type: Prediction = "epsilon", sample_size: int = 16) -> Path:
    """A Stable Diffusion 1.x or 2.x with about 1.5 million weights."""
    pipeline = replace(RANDOM_MODELS["tiny"], latent_side=sample_size).pipeline()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline.register_modules(scheduler=scheduler)
    pipeline.save_pretrained(folder)
    return folder


_XL_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
_XL_UNETS: dict[str, dict[str, Any]] = {
    "base": {"transformer_layers_per_block": (1, 2)},
    # Fewer layers, no middle block, and different layers in the up blocks.
    "ssd": {
        "transformer_layers_per_block": [1, [1]],
        "reverse_transformer_layers_per_block": [[2, 1], 1],
        "mid_block_type": None,
    },
}


def save_sdxl(
    folder: Path,
    layout: Literal["base", "ssd"] = "base",
    *,
    turbo: bool = False,
    zeros: bool = True,
    in_channels: int = 4,
) -> Path:
    """A Stable Diffusion XL with about a million weights; native size 128x128.

    Args:
        in_channels: of the UNet; 9 for inpainting.
        zeros: `force_zeros_for_empty_prompt`.
    """
    torch.manual_seed(0)
    tokenizer = bytewise_tokenizer()
    scheduler: Any = (
        EulerAncestralDiscreteScheduler(timestep_spacing="trailing", **_XL_SCHEDULE)
        if turbo
        else EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **_XL_SCHEDULE)
    )
    pipeline: Any = StableDiffusionXLPipeline(
        vae=AutoencoderKL(**SMALL_VAE, scaling_factor=0.13025).eval(),
        text_encoder=CLIPTextModel(_clip_config(tokenizer, 32)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer, 48, projection_dim=40)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=_second_tokenizer(),
        unet=_xl_unet(32 + 48, 40 + 6 * 8, in_channels=in_channels, **_XL_UNETS[layout]),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=zeros,
    )
    pipeline.save_pretrained(folder)
    return folder


# Playground 2.5's statistics of latents.
EDM_LATENTS: dict[str, Any] = {
    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
    "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
}


def save_with_scheduler(folder: Path, scheduler: Any) -> Path:
    """An SDXL model with a scheduler of its own."""
    save_sdxl(folder)
    scheduler.save_pretrained(folder / "scheduler")
    return folder


# Schedulers that clip the predicted clean latents; diffusers turns that off for Stable Diffusion.
CLIPPING: dict[str, DDIMScheduler] = {
    "clip_sample": DDIMScheduler(clip_sample=True, **_XL_SCHEDULE),
    "thresholding": DDIMScheduler(thresholding=True, clip_sample=False, **_XL_SCHEDULE),
}


def save_playground(folder: Path) -> Path:
    """A small SDXL in the layout of Playground 2.5: EDM, and a VAE with statistics of its latents."""
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(save_sdxl(folder))
    pipeline.register_modules(
        vae=AutoencoderKL(**SMALL_VAE, scaling_factor=0.5, **EDM_LATENTS).eval(),
        scheduler=EDMDPMSolverMultistepScheduler(),
    )
    pipeline.save_pretrained(folder)
    return folder


def save_refiner(folder: Path, base: Path, width: int = 56) -> Path:
    """A refiner for the model in `base`, with that model's VAE and its own text encoder.

    Args:
        width: of the text encoder; 48 is that of the base model's second one.
    """
    torch.manual_seed(1)
    tokenizer = _second_tokenizer()
    base_pipeline: Any = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline: Any = StableDiffusionXLImg2ImgPipeline(
        vae=base_pipeline.vae,
        text_encoder=None,  # pyright: ignore[reportArgumentType]  optional, whatever its annotation says
        tokenizer=None,  # pyright: ignore[reportArgumentType]  the same
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer, width, projection_dim=40)).eval(),
        tokenizer_2=tokenizer,
        unet=_xl_unet(width, 40 + 5 * 8, **_XL_UNETS["base"]),
        scheduler=base_pipeline.scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def _xl_unet(cross_attention_dim: int, embedding_dim: int, **layers: Any) -> Any:
    """
    Args:
        embedding_dim: width of the pooled prompt embeddings and the size embeddings, concatenated.
    """
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=4,
        use_linear_projection=True,
        cross_attention_dim=cross_attention_dim,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=embedding_dim,
        **layers,
    ).eval()


def save_flux(folder: Path, variant: Literal["dev", "schnell", "fill"] = "dev") -> Path:
    """A FLUX.1 with a hundred thousand weights; dev and Fill have guidance embeddings, dynamic shifting."""
    torch.manual_seed(0)
    is_dev = variant != "schnell"
    is_fill = variant == "fill"
    tokenizer = bytewise_tokenizer()
    pipeline: Any = (FluxFillPipeline if is_fill else FluxPipeline)(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            # Four pixels in a patch; Fill also takes the kept region and 64 pixels of the mask.
            in_channels=4 * (4 + 4 + 64) if is_fill else 16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            axes_dims_rope=(4, 6, 6),
            guidance_embeds=is_dev,
        ).eval(),
        vae=_flow_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=CLIPTextModel(_clip_config(tokenizer, 24)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=_t5_encoder(32),
        tokenizer_2=letterwise_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if is_dev else 1.0, use_dynamic_shifting=is_dev),
    )
    pipeline.save_pretrained(folder)
    return folder


def save_sd3(
    folder: Path, *, t5: bool = True, version: Literal["3", "3.5"] = "3.5", channels: int = 4
) -> Path:
    """A Stable Diffusion 3 with a hundred thousand weights; native size 128x128.

    Args:
        version: 3.5 has normalized queries and keys, and in its medium variant dual attention layers.
        channels: latent channels; diffusers' inpainting pipeline needs 16.
    """
    torch.manual_seed(0)
    tokenizer = bytewise_tokenizer()
    sd35_options: dict[str, Any] = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}
    pipeline: Any = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=channels,
            out_channels=channels,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=64,
            pooled_projection_dim=24 + 32,
            pos_embed_max_size=24,
            **(sd35_options if version == "3.5" else {}),
        ).eval(),
        vae=_flow_vae(latent_channels=channels, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(_clip_config(tokenizer, 24, projection_dim=24)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer, 32, projection_dim=32)).eval(),
        tokenizer_2=_second_tokenizer(),
        text_encoder_3=_t5_encoder(64) if t5 else None,  # pyright: ignore[reportArgumentType]  optional
        tokenizer_3=letterwise_tokenizer() if t5 else None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.save_pretrained(folder)
    return folder


def with_default_side(folder: Path, side: int) -> Path:
    """The model with another default size, at which it is warmed up; FLUX's takes half a minute on a CPU."""
    card = {"defaults": {"width": side, "height": side}}
    (folder / "hypergen.json").write_text(json.dumps(card), encoding="utf-8")
    return folder


def _flow_vae(**changes: Any) -> Any:
    return AutoencoderKL(**SMALL_VAE, use_quant_conv=False, use_post_quant_conv=False, **changes).eval()


def _t5_encoder(hidden_size: int) -> Any:
    config = T5Config(
        vocab_size=128,
        d_model=hidden_size,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def _second_tokenizer() -> Any:
    """The tokenizer of the second text encoder: it pads with "!" instead of the end token."""
    tokenizer = bytewise_tokenizer()
    tokenizer.pad_token = "!"
    return tokenizer


def _clip_config(tokenizer: Any, hidden_size: int, **changes: Any) -> Any:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **changes,
    )
