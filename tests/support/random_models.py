"""Models with random weights: shapes and costs of real models, without their files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode


@dataclass(frozen=True)
class RandomModel:
    """A Stable Diffusion with random weights.

    Attributes:
        family: its name in `FAMILIES`.
        latent_side: height and width of the latents; an image has 8 times as many pixels.
        unet, vae, text_encoder: arguments that differ from the classes' defaults.
    """

    family: ClassVar[str] = "sd"

    latent_side: int
    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]

    @property
    def side(self) -> int:
        """Height and width of an image, in pixels."""
        return 8 * self.latent_side

    def pipeline(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """A diffusers pipeline; the weights only depend on device and dtype."""
        tokenizer = bytewise_tokenizer()
        with default_device(device, dtype):
            unet = UNet2DConditionModel(
                sample_size=self.latent_side,
                cross_attention_dim=self.text_encoder["hidden_size"],
                **self.unet,
            ).eval()
            vae = AutoencoderKL(**self.vae).eval()
            text_encoder = CLIPTextModel(clip_config(tokenizer, self.text_encoder)).eval()
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=sd_scheduler(),
            safety_checker=None,  # pyright: ignore[reportArgumentType]  optional, whatever its annotation says
            feature_extractor=None,  # pyright: ignore[reportArgumentType]  the same
            requires_safety_checker=False,
        )


@contextmanager
def default_device(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Create the networks inside the block on this device, with this dtype and seed 0.

    Large ones would not fit into main memory as float32.
    """
    torch.manual_seed(0)
    previous_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(previous_dtype)


def clip_config(tokenizer: Any, changes: dict[str, Any]) -> CLIPTextConfig:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special_tokens = {name: getattr(tokenizer, name) for name in names}
    return CLIPTextConfig(**{"vocab_size": len(tokenizer), **special_tokens, **changes})


def sd_scheduler() -> Any:
    """The Euler scheduler with the training schedule of Stable Diffusion up to XL."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )


def bytewise_tokenizer() -> Any:
    """A CLIP tokenizer with a vocabulary of single bytes: no download, and tokens for every text."""
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def letterwise_tokenizer() -> Any:
    """A T5 tokenizer with a vocabulary of single letters."""
    letters = [("▁", -2.0), *((chr(code), -3.0) for code in range(33, 127))]
    special_tokens = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special_tokens, *letters], extra_ids=0)


SMALL_VAE: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 4,
}
_THREE_LEVELS: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}

RANDOM_MODELS: dict[str, RandomModel] = {
    # 1.5 million weights, which generate noise at 1024x1024, so the largest PNG files: for measuring HTTP.
    "tiny": RandomModel(
        latent_side=128,
        unet={
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 8,
        },
        vae=SMALL_VAE,
        text_encoder={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
    ),
    # 8.8 million weights, 8x8 latents: mostly overhead in a forward pass, as on a GPU at 512x512.
    "small": RandomModel(
        latent_side=8,
        unet={"block_out_channels": (64, 128, 192), "layers_per_block": 1, **_THREE_LEVELS},
        vae=SMALL_VAE,
        text_encoder={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
    ),
    # 51.5 million weights, 16x16 latents: time is proportional to rows, as on a GPU at 1024x1024.
    "medium": RandomModel(
        latent_side=16,
        unet={"block_out_channels": (128, 256, 384), "layers_per_block": 2, **_THREE_LEVELS},
        vae=SMALL_VAE,
        text_encoder={
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
        },
    ),
}
