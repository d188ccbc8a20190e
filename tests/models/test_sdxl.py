"""Stable Diffusion XL against diffusers' pipeline: the same image, alone and in a batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from hypergen.denoising.schedulers import SAMPLERS, find_sampler
from hypergen.model_info import ModelDefaults
from hypergen.models import loading
from hypergen.models.family import Family
from hypergen.request import GenerationRequest
from tests.support.compare_with_diffusers import (
    CHUNK,
    assert_close_in_half_precision,
    assert_matches_diffusers,
    assert_same,
    common_arguments,
    stock_pipeline,
    use_sampler,
)
from tests.support.small_models import save_sdxl
from tests.support.sync_engine import generate_alone, make_request, make_settings

_GUIDED = make_request(
    num_inference_steps=5, guidance_scale=6.0, negative_prompt="blurred", width=96, height=64, seed=11
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("models") / "small-sdxl")


@pytest.fixture(scope="module")
def stock(base: Path) -> Any:
    return stock_pipeline(StableDiffusionXLPipeline, base)


@pytest.fixture(scope="module")
def family(base: Path) -> Family:
    return loading.load(base, make_settings())


def _stock_image(pipeline: Any, request: GenerationRequest) -> np.ndarray:
    with use_sampler(pipeline, find_sampler(request.sampler, SAMPLERS) if request.sampler else None):
        image = pipeline(
            request.prompt,
            prompt_2=request.prompt_2,
            negative_prompt=request.negative_prompt,
            negative_prompt_2=request.negative_prompt_2,
            **common_arguments(request),
        ).images[0]
    return np.asarray(image)


def test_every_image_equals_that_of_diffusers(stock: Any, family: Family) -> None:
    samplers = ("euler_a", "dpmpp_2m_karras", "dpmpp_3m_sde_exponential", "heun", "ddim", "euler_beta")
    requests = [
        _GUIDED,
        replace(_GUIDED, id="two", prompt_2="a dog", negative_prompt_2="grey", seed=12),
        replace(_GUIDED, id="no-negative", negative_prompt=None),
        replace(_GUIDED, id="unguided", guidance_scale=1.0, num_inference_steps=7),
        *(replace(_GUIDED, id=name, sampler=name, num_inference_steps=4) for name in samplers),
    ]
    assert_matches_diffusers(family, requests, lambda request: _stock_image(stock, request))


def test_ssd_1b_equals_diffusers(tmp_path: Path) -> None:
    folder = save_sdxl(tmp_path / "ssd", "ssd", zeros=False)
    pipeline = stock_pipeline(StableDiffusionXLPipeline, folder)
    # Without forced zeros, an absent negative prompt is the empty one.
    for request in (_GUIDED, replace(_GUIDED, negative_prompt=None)):
        family = loading.load(folder, make_settings())
        assert_same(generate_alone(family, request), _stock_image(pipeline, request))


def test_long_prompts_are_encoded_in_chunks(stock: Any, family: Family) -> None:
    """diffusers encodes each chunk by itself; the shorter text is padded with empty chunks, also for the
    second encoder.
    """
    long = replace(_GUIDED, id="long", prompt=f"{CHUNK} a cat", prompt_2=None)
    long_2 = replace(_GUIDED, id="long-2", prompt="a cat", prompt_2=f"{CHUNK} a dog", negative_prompt=None)
    parts = {
        "long": ((CHUNK, "a cat"), (CHUNK, "a cat"), ("blurred", "")),
        "long-2": (("a cat", ""), (CHUNK, "a dog"), None),
    }

    def encode(text: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        embeds, _, pooled, _ = stock.encode_prompt(text, do_classifier_free_guidance=False)
        return embeds[..., :32], embeds[..., 32:], pooled

    def encode_chunks(texts: tuple[str, str], texts_2: tuple[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
        first = torch.cat([encode(text)[0] for text in texts], dim=1)
        second = torch.cat([encode(text)[1] for text in texts_2], dim=1)
        return torch.cat([first, second], dim=-1), encode(texts_2[0])[2]

    @torch.inference_mode()
    def stock_image(request: GenerationRequest) -> np.ndarray:
        texts, texts_2, negative_texts = parts[request.id]
        embeds, pooled = encode_chunks(texts, texts_2)
        negative, negative_pooled = (
            encode_chunks(negative_texts, negative_texts)
            if negative_texts
            else (torch.zeros_like(embeds), torch.zeros_like(pooled))
        )
        return np.asarray(
            stock(
                prompt_embeds=embeds,
                pooled_prompt_embeds=pooled,
                negative_prompt_embeds=negative,
                negative_pooled_prompt_embeds=negative_pooled,
                **common_arguments(request),
            ).images[0]
        )

    assert_matches_diffusers(family, [long, long_2], stock_image)


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_close_to_diffusers(base: Path, dtype: str) -> None:
    pipeline = stock_pipeline(StableDiffusionXLPipeline, base, dtype=getattr(torch, dtype))
    family: Any = loading.load(base, make_settings(dtype=dtype))
    # SDXL's VAE overflows in float16.
    assert family.vae.dtype == (torch.float32 if dtype == "float16" else torch.bfloat16)
    request = replace(_GUIDED, num_inference_steps=3)
    assert_close_in_half_precision(generate_alone(family, request), _stock_image(pipeline, request))


def test_turbo_defaults_to_four_steps_without_guidance(tmp_path: Path, family: Family) -> None:
    turbo = loading.load(save_sdxl(tmp_path / "turbo", turbo=True), make_settings())
    assert turbo.model_info("turbo").defaults == ModelDefaults(4, 1.0, 1024, 1024)
    assert family.model_info("base").defaults == ModelDefaults(50, 7.5, 128, 128)
    assert family.model_info("base").capabilities == {"prompt_2", "negative_prompt", "image", "mask", "loras"}
    pipeline = stock_pipeline(StableDiffusionXLPipeline, tmp_path / "turbo")
    request = replace(_GUIDED, num_inference_steps=4, guidance_scale=1.0)
    assert_same(generate_alone(turbo, request), _stock_image(pipeline, request))
