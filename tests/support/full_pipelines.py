"""Small diffusers pipelines without a family in HyperGen, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from tests.support.random_models import SMALL_VAE

_TEXT_DIM = 32


def _t5() -> tuple[Any, Any]:
    """A T5 tokenizer of single letters, and a T5 encoder with two layers."""
    tokens = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(33, 127))]
    tokenizer = T5Tokenizer(vocab=[(token, -float(i)) for i, token in enumerate(tokens)], extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=_TEXT_DIM, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    return tokenizer, T5EncoderModel(config).eval()


def save_pixart(folder: Path) -> Path:
    """PixArt-Sigma, whose pipeline has the older `callback` argument."""
    torch.manual_seed(0)
    tokenizer, text_encoder = _t5()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=_TEXT_DIM,
        num_layers=2,
        sample_size=16,
        norm_num_groups=1,
        use_additional_conditions=False,
    )
    pipeline: Any = PixArtSigmaPipeline(
        tokenizer,
        text_encoder,
        AutoencoderKL(**SMALL_VAE).eval(),
        transformer.eval(),
        DPMSolverMultistepScheduler(),  # pyright: ignore[reportArgumentType]  annotated as an enum
    )
    pipeline.save_pretrained(folder)
    return folder


def save_cogview(folder: Path) -> Path:
    """CogView3-Plus, whose pipeline has `callback_on_step_end`."""
    torch.manual_seed(0)
    tokenizer, text_encoder = _t5()
    transformer = CogView3PlusTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        text_embed_dim=_TEXT_DIM,
        time_embed_dim=32,
        condition_dim=16,
        pos_embed_max_size=16,
        sample_size=16,
    )
    pipeline: Any = CogView3PlusPipeline(
        tokenizer,
        text_encoder,
        AutoencoderKL(**SMALL_VAE).eval(),
        transformer.eval(),
        CogVideoXDDIMScheduler(),
    )
    pipeline.save_pretrained(folder)
    return folder
