"""Stable Diffusion 3 against diffusers' pipeline: the same image, alone and in a batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from hypergen.denoising.schedulers import FLOW_SAMPLERS, find_sampler
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
from tests.support.small_models import save_sd3
from tests.support.sync_engine import generate_alone, make_request, make_settings

_GUIDED = make_request(
    num_inference_steps=5, guidance_scale=6.0, negative_prompt="blurred", width=96, height=64, seed=11
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("models") / "small-sd3")


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    return stock_pipeline(StableDiffusion3Pipeline, folder)


@pytest.fixture(scope="module")
def family(folder: Path) -> Family:
    return loading.load(folder, make_settings())


def _stock_image(pipeline: Any, request: GenerationRequest) -> np.ndarray:
    with use_sampler(pipeline, find_sampler(request.sampler, FLOW_SAMPLERS) if request.sampler else None):
        image = pipeline(
            request.prompt,
            prompt_2=request.prompt_2,
            negative_prompt=request.negative_prompt,
            negative_prompt_2=request.negative_prompt_2,
            **common_arguments(request),
        ).images[0]
    return np.asarray(image)


def test_every_image_equals_that_of_diffusers(stock: Any, family: Family) -> None:
    requests = [
        _GUIDED,
        replace(_GUIDED, id="two", prompt_2="a dog", negative_prompt_2="grey", seed=12),
        replace(_GUIDED, id="no-negative", negative_prompt=None, num_inference_steps=3),
        replace(_GUIDED, id="unguided", guidance_scale=1.0, num_inference_steps=7),
        replace(_GUIDED, id="heun", sampler="heun"),
        replace(_GUIDED, id="karras", sampler="euler_karras"),
        replace(_GUIDED, id="beta", sampler="euler_beta", num_inference_steps=5),
        replace(_GUIDED, id="euler", sampler="euler", guidance_scale=2.0),
    ]
    assert_matches_diffusers(family, requests, lambda request: _stock_image(stock, request))


@pytest.mark.parametrize("version", ["3", "3.5"])
def test_a_model_without_t5_equals_diffusers(tmp_path: Path, version: Any) -> None:
    folder = save_sd3(tmp_path / "small-sd3", t5=False, version=version)
    pipeline = stock_pipeline(StableDiffusion3Pipeline, folder, text_encoder_3=None, tokenizer_3=None)
    # Some finetunes have a scheduler that shifts with the image size.
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    image = generate_alone(loading.load(folder, make_settings()), _GUIDED)
    assert_same(image, _stock_image(pipeline, _GUIDED))


def test_long_prompts_are_encoded_in_chunks(stock: Any, family: Family) -> None:
    """diffusers encodes each CLIP chunk by itself, and the full text with T5; the shorter text is padded with
    empty chunks.
    """
    long = replace(_GUIDED, id="long", prompt=f"{CHUNK} a cat")
    long_too = replace(_GUIDED, id="long-too", prompt="a cat", negative_prompt=f"{CHUNK} a dog", seed=5)
    chunks = {
        long.prompt: (CHUNK, "a cat"),
        "blurred": ("blurred", ""),
        "a cat": ("a cat", ""),
        f"{CHUNK} a dog": (CHUNK, "a dog"),
    }

    def encode_chunks(text: str) -> tuple[torch.Tensor, torch.Tensor]:
        def encode(part: str) -> tuple[torch.Tensor, torch.Tensor]:
            embeds, _, pooled, _ = stock.encode_prompt(part, None, None, do_classifier_free_guidance=False)
            return embeds, pooled

        parts = [encode(part) for part in chunks[text]]
        clip = [embeds[:, :77] for embeds, _ in parts]
        t5 = encode(text)[0][:, 77:]
        return torch.cat([*clip, t5], dim=1), parts[0][1]

    @torch.inference_mode()
    def stock_image(request: GenerationRequest) -> np.ndarray:
        embeds, pooled = encode_chunks(request.prompt)
        negative, negative_pooled = encode_chunks(request.negative_prompt or "")
        return np.asarray(
            stock(
                prompt_embeds=embeds,
                pooled_prompt_embeds=pooled,
                negative_prompt_embeds=negative,
                negative_pooled_prompt_embeds=negative_pooled,
                **common_arguments(request),
            ).images[0]
        )

    assert_matches_diffusers(family, [long, long_too], stock_image)


def test_model_info_has_defaults_and_capabilities(family: Family) -> None:
    info = family.model_info("sd3")
    assert info.defaults == ModelDefaults(50, 7.5, 128, 128)
    assert info.capabilities == {"prompt_2", "negative_prompt", "image", "mask"}
    assert info.samplers.keys() == {"euler", "heun"}
    assert family.generation_size(100, 72) == (112, 80)


def test_half_precision_is_close_to_diffusers(folder: Path) -> None:
    pipeline = stock_pipeline(StableDiffusion3Pipeline, folder, dtype=torch.bfloat16)
    family = loading.load(folder, make_settings(dtype="bfloat16"))
    request = replace(_GUIDED, num_inference_steps=3)
    assert_close_in_half_precision(generate_alone(family, request), _stock_image(pipeline, request))
