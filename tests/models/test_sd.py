"""Stable Diffusion against diffusers' pipeline: the same image, alone and in a batch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from hypergen.denoising.schedulers import SAMPLERS, find_sampler
from hypergen.models import loading
from hypergen.models.family import Family
from hypergen.request import GenerationRequest
from tests.support.compare_with_diffusers import assert_close_in_half_precision
from tests.support.samplers import SOME_NAMES
from tests.support.sync_engine import InlineEngine, generate_alone, make_request, make_settings


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def folder(request: pytest.FixtureRequest, sd_folder: Path, v_prediction_folder: Path) -> Path:
    return sd_folder if request.param == "epsilon" else v_prediction_folder


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def family(folder: Path) -> Family:
    return loading.load(folder, make_settings())


def _requests(sampler: str | None) -> list[GenerationRequest]:
    guided = make_request(
        sampler=sampler,
        num_inference_steps=5,
        guidance_scale=6.0,
        negative_prompt="blurred",
        width=96,
        height=64,
        seed=11,
    )
    return [guided, make_request(sampler=sampler, num_inference_steps=4, guidance_scale=1.0, seed=12)]


def _stock_image(pipeline: Any, request: GenerationRequest) -> np.ndarray:
    published = pipeline.scheduler
    if request.sampler:
        sampler = find_sampler(request.sampler, SAMPLERS)
        pipeline.scheduler = sampler.scheduler.from_config(published.config, **sampler.overrides)
    try:
        image = pipeline(
            request.prompt,
            negative_prompt=request.negative_prompt,
            width=request.width,
            height=request.height,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed),
            # The pipeline's default is 0; TCD needs 0.3.
            eta=0.3 if request.sampler == "tcd" else 0.0,
        ).images[0]
    finally:
        pipeline.scheduler = published
    return np.asarray(image)


def _assert_same(image: np.ndarray, stock: np.ndarray) -> None:
    difference = np.abs(image.astype(int) - stock.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.001


def test_every_image_equals_that_of_diffusers(stock: Any, family: Family) -> None:
    requests = [request for name in [None, *SOME_NAMES] for request in _requests(name)]
    batched = InlineEngine(family)
    batched.run(*requests)
    shared = 0
    for request in requests:
        expected = _stock_image(stock, request)
        _assert_same(generate_alone(family, request), expected)
        _assert_same(np.asarray(Image.open(io.BytesIO(batched.data(request)))), expected)
        shared += batched.images[request.id][0].shared_forwards > 0
    assert shared >= len(requests) - 1


def test_a_size_between_multiples_is_cropped_from_the_center(family: Family) -> None:
    cropped, full = make_request(width=100, height=68), make_request(width=104, height=72)
    engine = InlineEngine(family)
    engine.run(cropped, full)
    image = np.asarray(Image.open(io.BytesIO(engine.data(cropped))))
    assert image.shape == (68, 100, 3)
    assert (image == np.asarray(Image.open(io.BytesIO(engine.data(full))))[2:70, 2:102]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_close_to_diffusers(folder: Path, dtype: str) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, dtype=getattr(torch, dtype)
    )
    pipeline.set_progress_bar_config(disable=True)
    family = loading.load(folder, make_settings(dtype=dtype))
    for request in _requests(None):
        assert_close_in_half_precision(generate_alone(family, request), _stock_image(pipeline, request))


def test_a_vae_that_overflows_is_an_error_and_no_black_image(folder: Path) -> None:
    family: Any = loading.load(folder, make_settings())
    with torch.no_grad():
        family.vae.post_quant_conv.bias.fill_(torch.inf)
    bad = make_request()
    engine = InlineEngine(family)
    engine.run(bad)
    assert "The VAE produced NaN" in engine.errors[bad.id].message
