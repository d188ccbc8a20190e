"""Published models with random weights for GPUs, and tiny models with the same architecture for a CPU.

Configurations: stable-diffusion-v1-5/stable-diffusion-v1-5, stabilityai/stable-diffusion-xl-base-1.0 and
black-forest-labs/FLUX.1-dev. Only the tokenizers differ; their cost does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from hypergen.config import EngineSettings
from hypergen.errors import ConfigurationError
from hypergen.model_families import FAMILIES
from hypergen.models import loading
from tests.support.random_models import (
    RANDOM_MODELS,
    SMALL_VAE,
    RandomModel,
    bytewise_tokenizer,
    clip_config,
    default_device,
    letterwise_tokenizer,
    sd_scheduler,
)


@dataclass(frozen=True)
class RandomXL:
    """A Stable Diffusion XL with random weights; see `RandomModel`."""

    family: ClassVar[str] = "sdxl"

    latent_side: int
    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    text_encoder_2: dict[str, Any]

    @property
    def side(self) -> int:
        """Height and width of an image, in pixels."""
        return 8 * self.latent_side

    def pipeline(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """A diffusers pipeline; the weights only depend on device and dtype."""
        tokenizer, tokenizer_2 = bytewise_tokenizer(), bytewise_tokenizer()
        tokenizer_2.pad_token = "!"
        with default_device(device, dtype):
            text_encoder = CLIPTextModel(clip_config(tokenizer, self.text_encoder)).eval()
            second = CLIPTextModelWithProjection(clip_config(tokenizer_2, self.text_encoder_2)).eval()
            unet = UNet2DConditionModel(sample_size=self.latent_side, **self.unet).eval()
            vae = AutoencoderKL(**self.vae).eval()
        return StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=second,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=sd_scheduler(),
            add_watermarker=False,
        )


@dataclass(frozen=True)
class RandomFlux:
    """A FLUX.1 with random weights; see `RandomModel`.

    Attributes:
        text_encoder, text_encoder_2: CLIP and T5.
    """

    family: ClassVar[str] = "flux"

    latent_side: int
    transformer: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    text_encoder_2: dict[str, Any]

    @property
    def side(self) -> int:
        """Height and width of an image, in pixels."""
        return 8 * self.latent_side

    def pipeline(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """A diffusers pipeline; the weights only depend on device and dtype."""
        tokenizer = bytewise_tokenizer()
        with default_device(device, dtype):
            text_encoder = CLIPTextModel(clip_config(tokenizer, self.text_encoder)).eval()
            second = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **self.text_encoder_2)).eval()
            transformer = FluxTransformer2DModel(patch_size=1, guidance_embeds=True, **self.transformer)
            vae = AutoencoderKL(use_quant_conv=False, use_post_quant_conv=False, **self.vae).eval()
        return FluxPipeline(
            transformer=transformer.eval(),
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=second,
            tokenizer_2=letterwise_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        )


_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
_CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
# OpenCLIP's ViT-bigG/14.
_CLIP_BIG_G: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
# T5 v1.1 XXL.
_T5_XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
}
_FLUX_SCALE: dict[str, Any] = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
_TINY_CLIP: dict[str, Any] = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

# For measurements on GPUs; the denoisers have 860 million, 2.6 and 11.9 billion weights.
PUBLISHED: dict[str, RandomModel | RandomXL | RandomFlux] = {
    "sd15": RandomModel(latent_side=64, unet={}, vae=_VAE, text_encoder=_CLIP_L),
    "sdxl": RandomXL(
        latent_side=128,
        unet={
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        vae={**_VAE, "scaling_factor": 0.13025},
        text_encoder=_CLIP_L,
        text_encoder_2=_CLIP_BIG_G,
    ),
    "flux-dev": RandomFlux(
        latent_side=128,
        transformer={
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "axes_dims_rope": (16, 56, 56),
        },
        vae={**_VAE, "latent_channels": 16, **_FLUX_SCALE},
        text_encoder=_CLIP_L,
        text_encoder_2=_T5_XXL,
    ),
}
TINY: dict[str, RandomModel | RandomXL | RandomFlux] = {
    "tiny-sd": replace(RANDOM_MODELS["tiny"], latent_side=8),
    "tiny-sdxl": RandomXL(
        latent_side=16,
        unet={
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "norm_num_groups": 8,
            "attention_head_dim": 4,
            "cross_attention_dim": 32 + 48,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 40 + 6 * 8,
        },
        vae={**SMALL_VAE, "scaling_factor": 0.13025},
        text_encoder={"hidden_size": 32, **_TINY_CLIP},
        text_encoder_2={"hidden_size": 48, "projection_dim": 40, **_TINY_CLIP},
    ),
    "tiny-flux": RandomFlux(
        latent_side=16,
        transformer={
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
        vae={**SMALL_VAE, **_FLUX_SCALE},
        text_encoder={"hidden_size": 24, **_TINY_CLIP},
        text_encoder_2={
            "vocab_size": 128,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
        },
    ),
}
# Every model with random weights.
RANDOM_WEIGHTS: dict[str, RandomModel | RandomXL | RandomFlux] = {**RANDOM_MODELS, **TINY, **PUBLISHED}
_FOR_CPUS = {"sd15": "small", "sdxl": "tiny-sdxl", "flux-dev": "tiny-flux"}


def dtype_for(model: RandomModel | RandomXL | RandomFlux, settings: EngineSettings) -> torch.dtype:
    """The dtype that a server with these settings chooses for a model."""
    half_dtype = FAMILIES[model.family].import_class().half_dtype
    return loading.choose_dtype(settings, torch.device(settings.device or "cpu"), {}, half_dtype)


def refuse_on_cpu(name: str) -> None:
    """
    Raises:
        ConfigurationError: the model is too large for a CPU.
    """
    if name in PUBLISHED:
        raise ConfigurationError(
            f"'{name}' is for a GPU; on a CPU use '{_FOR_CPUS[name]}', which has the same architecture."
        )
