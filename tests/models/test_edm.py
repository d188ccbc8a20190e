"""Playground 2.5, an SDXL with EDM's preconditioning and statistics of its latents, against diffusers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from hypergen.denoising.schedulers import EDM_SAMPLERS
from hypergen.engine.previews import pred_original_sample
from hypergen.errors import SettingError
from hypergen.models import loading
from hypergen.models.family import Family
from tests.support.compare_with_diffusers import (
    assert_matches_diffusers,
    assert_same,
    common_arguments,
    stock_pipeline,
    use_sampler,
)
from tests.support.diffusers_edits import sample_image, to_pillow
from tests.support.small_models import save_playground, save_refiner
from tests.support.sync_engine import generate_alone, make_request, make_settings, prepare_image

_REQUEST = make_request(num_inference_steps=4, guidance_scale=3.0, negative_prompt="blurred", seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_playground(tmp_path_factory.mktemp("models") / "playground")


@pytest.fixture(scope="module")
def family(folder: Path) -> Family:
    return loading.load(folder, make_settings())


def test_every_image_equals_that_of_diffusers(folder: Path, family: Family) -> None:
    stock = stock_pipeline(StableDiffusionXLPipeline, folder)

    def generate(request: Any) -> np.ndarray:
        with use_sampler(stock, EDM_SAMPLERS[request.sampler] if request.sampler else None):
            image = stock(
                request.prompt, negative_prompt=request.negative_prompt, **common_arguments(request)
            )
        return np.asarray(image.images[0])

    requests = [_REQUEST, *(replace(_REQUEST, id=name, sampler=name) for name in EDM_SAMPLERS)]
    assert_matches_diffusers(family, requests, generate)


def test_an_input_image_is_encoded_with_the_statistics_of_the_latents(folder: Path, family: Family) -> None:
    stock = stock_pipeline(StableDiffusionXLImg2ImgPipeline, folder)
    image = sample_image()
    request = replace(_REQUEST, id="edit", image=image, strength=0.6, num_inference_steps=5)
    theirs = stock(
        request.prompt,
        negative_prompt=request.negative_prompt,
        image=to_pillow(image),
        strength=request.strength,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
    )
    assert_same(generate_alone(family, request), np.asarray(theirs.images[0]))


def test_only_samplers_of_edm_are_offered(family: Family) -> None:
    assert family.model_info("model").samplers.keys() == EDM_SAMPLERS.keys()


def test_previews_show_the_clean_latents(family: Family) -> None:
    state = prepare_image(family, _REQUEST)
    prediction = torch.randn(state.latents.shape, generator=torch.Generator().manual_seed(1))
    sigma = state.scheduler.sigmas[0]
    clean = state.scheduler.precondition_outputs(state.latents, prediction, sigma)
    assert torch.allclose(pred_original_sample(state, prediction), clean, rtol=1e-4)


def test_a_refiner_is_refused(folder: Path, tmp_path: Path) -> None:
    refiner = save_refiner(tmp_path / "refiner", folder)
    with pytest.raises(SettingError, match="refiner is not supported for models with an EDM scheduler"):
        loading.load(folder, make_settings(refiner=str(refiner)))
