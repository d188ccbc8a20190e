"""SDXL with its refiner against diffusers' two pipelines in a row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from hypergen.denoising.schedulers import SAMPLERS, find_sampler
from hypergen.errors import SettingError
from hypergen.models import loading
from hypergen.models.family import Family
from hypergen.request import ControlInput, GenerationRequest
from tests.conditioning.test_controlnet import random_controlnet
from tests.support.compare_with_diffusers import (
    assert_matches_diffusers,
    common_arguments,
    stock_pipeline,
    use_sampler,
)
from tests.support.diffusers_edits import sample_image
from tests.support.samplers import SOME_NAMES
from tests.support.small_models import save_refiner, save_sdxl
from tests.support.sync_engine import generate_alone, make_request, make_settings, prepare_image

_REFINED = make_request(
    num_inference_steps=8, negative_prompt="blurred", width=96, height=64, seed=11, enable_refiner=True
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("models") / "small-sdxl")


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return save_refiner(tmp_path_factory.mktemp("models") / "small-refiner", base)


@pytest.fixture(scope="module")
def family(base: Path, refiner: Path) -> Family:
    return loading.load(base, make_settings(refiner=str(refiner)))


def test_base_and_refiner_equal_diffusers(base: Path, refiner: Path, family: Family) -> None:
    stock_base = stock_pipeline(StableDiffusionXLPipeline, base)
    stock_refiner = stock_pipeline(
        StableDiffusionXLImg2ImgPipeline, refiner, text_encoder=None, tokenizer=None
    )

    def stock_image(request: GenerationRequest) -> np.ndarray:
        sampler = find_sampler(request.sampler, SAMPLERS) if request.sampler else None
        texts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
        with use_sampler(stock_base, sampler), use_sampler(stock_refiner, sampler):
            if not request.enable_refiner:
                return np.asarray(stock_base(**texts, **common_arguments(request)).images[0])
            latents = stock_base(
                **texts, **common_arguments(request), denoising_end=0.8, output_type="latent"
            ).images
            arguments = common_arguments(request)
            del arguments["width"], arguments["height"]
            return np.asarray(
                stock_refiner(**texts, **arguments, image=latents, denoising_start=0.8).images[0]
            )

    requests = [
        _REFINED,
        replace(_REFINED, id="another", num_inference_steps=6, negative_prompt=None, seed=12),
        replace(_REFINED, id="multistep", sampler="dpmpp_2m_karras"),
        replace(_REFINED, id="unipc", sampler="unipc"),
        replace(_REFINED, id="unguided", guidance_scale=1.0),
        replace(_REFINED, id="without", enable_refiner=False),
    ]
    assert_matches_diffusers(family, requests, stock_image)


@pytest.mark.parametrize("sampler", SOME_NAMES)
def test_every_sampler_switches_to_the_refiner(family: Family, sampler: str) -> None:
    refined = replace(_REFINED, sampler=sampler, num_inference_steps=6)
    plain = replace(refined, enable_refiner=False)
    state = prepare_image(family, refined)
    assert state.next_denoiser is not None
    assert state.remaining_steps == prepare_image(family, plain).remaining_steps
    assert (generate_alone(family, refined) != generate_alone(family, plain)).any()


def test_a_single_step_runs_on_the_base_model(family: Family) -> None:
    refined = replace(_REFINED, num_inference_steps=1)
    assert (
        generate_alone(family, refined) == generate_alone(family, replace(refined, enable_refiner=False))
    ).all()


def test_controlnet_works_on_the_base_model_with_a_refiner(base: Path, refiner: Path, tmp_path: Path) -> None:
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(base)
    random_controlnet(pipeline.components, 1).save_pretrained(tmp_path)
    family = loading.load(base, make_settings(refiner=str(refiner), controlnet={"edges": str(tmp_path)}))
    control = ControlInput(model="edges", image=sample_image(seed=4))
    plain = generate_alone(family, _REFINED)
    assert (generate_alone(family, replace(_REFINED, control=control)) != plain).any()
    assert (generate_alone(family, replace(_REFINED, control=replace(control, scale=0.0))) == plain).all()


def test_invalid_refiners_are_errors_at_startup(base: Path, refiner: Path, sd_folder: Path) -> None:
    with pytest.raises(SettingError, match="not a refiner of this model"):
        loading.load(base, make_settings(refiner=str(base)))
    with pytest.raises(SettingError, match="refiner is only supported for sdxl models; this is sd"):
        loading.load(sd_folder, make_settings(refiner=str(refiner)))
    with pytest.raises(SettingError, match="No such folder"):
        loading.load(base, make_settings(refiner=str(base / "missing")))


def test_the_capability_exists_only_with_a_refiner(base: Path, family: Any) -> None:
    assert "enable_refiner" in family.model_info("sdxl").capabilities
    assert "enable_refiner" not in loading.load(base, make_settings()).model_info("sdxl").capabilities
