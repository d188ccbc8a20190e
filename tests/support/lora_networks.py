"""Small networks of SDXL and FLUX for LoRA files, and what they compute."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from tests.support.random_models import SMALL_VAE

_TOKENS = torch.arange(7)[None]
_CLIP = CLIPTextConfig(
    vocab_size=100,
    projection_dim=32,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    bos_token_id=0,
    eos_token_id=6,
)


def sdxl() -> Any:
    torch.manual_seed(0)
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**SMALL_VAE),
        text_encoder=CLIPTextModel(_CLIP).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_CLIP).eval(),
        tokenizer=None,  # pyright: ignore[reportArgumentType]  no prompt is encoded here
        tokenizer_2=None,  # pyright: ignore[reportArgumentType]  the same
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32, 32),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=1,
            projection_class_embeddings_input_dim=80,
            cross_attention_dim=64,
            norm_num_groups=8,
        ).eval(),
        scheduler=EulerDiscreteScheduler(),  # pyright: ignore[reportArgumentType]  its enum is of names
    )


def flux() -> Any:
    torch.manual_seed(0)
    t5 = T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(**SMALL_VAE),
        text_encoder=CLIPTextModel(_CLIP).eval(),
        tokenizer=None,  # pyright: ignore[reportArgumentType]  no prompt is encoded here
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=None,  # pyright: ignore[reportArgumentType]  the same
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ).eval(),
    )


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_sdxl(pipeline: Any) -> list[Tensor]:
    added = {"text_embeds": noise(1, 32, seed=3), "time_ids": torch.full((1, 6), 64.0)}
    return [
        pipeline.unet(noise(1, 4, 8, 8, seed=1), 500, noise(1, 7, 64, seed=2), added_cond_kwargs=added)[0],
        pipeline.text_encoder(_TOKENS)[0],
        *pipeline.text_encoder_2(_TOKENS)[:2],
    ]


def run_flux(pipeline: Any) -> list[Tensor]:
    output = pipeline.transformer(
        noise(1, 16, 16, seed=1),
        noise(1, 5, 32, seed=2),
        noise(1, 32, seed=3),
        torch.full((1,), 0.5),
        torch.zeros(16, 3),
        torch.zeros(5, 3),
        guidance=torch.full((1,), 3.5),
    )
    return [output[0], pipeline.text_encoder(_TOKENS)[0], pipeline.text_encoder_2(_TOKENS)[0]]


MODELS = {"sdxl": (sdxl, run_sdxl), "flux": (flux, run_flux)}
