"""FLUX.1 against diffusers' pipeline: the same image, alone and in a batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, FluxPipeline
from safetensors.torch import save_file

from hypergen.denoising.schedulers import Sampler
from hypergen.model_info import ModelDefaults
from hypergen.models import loading
from hypergen.models.family import Family
from hypergen.request import GenerationRequest
from tests.support.compare_with_diffusers import (
    assert_close_in_half_precision,
    assert_matches_diffusers,
    assert_same,
    common_arguments,
    pixels_of,
    stock_pipeline,
    use_sampler,
)
from tests.support.lora_files import ATTENTION, random_lora, stock_image
from tests.support.small_models import save_flux
from tests.support.sync_engine import InlineEngine, generate_alone, make_request, make_settings, prepare_image

_REQUEST = make_request(num_inference_steps=5, guidance_scale=3.5, width=96, height=64, seed=11)
_LENGTH = {"dev": 512, "schnell": 256}


class HeunForFlux(FlowMatchHeunDiscreteScheduler):
    """diffusers' pipeline passes sigmas and a shift, which its Heun scheduler does not accept."""

    def set_timesteps(
        self, num_inference_steps: int = 0, device: Any = None, sigmas: Any = (), mu: float = 0.0
    ) -> None:
        super().set_timesteps(len(sigmas), device)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flux(tmp_path_factory.mktemp("models") / "small-dev")


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flux(tmp_path_factory.mktemp("models") / "small-schnell", "schnell")


def _stock_image(pipeline: Any, variant: str, request: GenerationRequest) -> np.ndarray:
    with use_sampler(pipeline, Sampler(HeunForFlux) if request.sampler == "heun" else None):
        image = pipeline(
            request.prompt,
            prompt_2=request.prompt_2,
            negative_prompt=request.negative_prompt,
            negative_prompt_2=request.negative_prompt_2,
            true_cfg_scale=4.0 if request.true_cfg_scale is None else request.true_cfg_scale,
            max_sequence_length=_LENGTH[variant],
            **common_arguments(request),
        ).images[0]
    return np.asarray(image)


def _bytes(family: Family, request: GenerationRequest) -> bytes:
    return generate_alone(family, request).tobytes()


def test_dev_equals_diffusers(dev: Path) -> None:
    pipeline = stock_pipeline(FluxPipeline, dev)
    requests = [
        _REQUEST,
        replace(_REQUEST, id="other-guidance", guidance_scale=9.0, num_inference_steps=3),
        replace(_REQUEST, id="negative", negative_prompt="blurred", seed=12),
        replace(_REQUEST, id="true-cfg", negative_prompt="blurred", true_cfg_scale=1.5, seed=12),
        replace(_REQUEST, id="no-cfg", negative_prompt="blurred", true_cfg_scale=1.0, seed=12),
        replace(_REQUEST, id="second", prompt_2="a dog", negative_prompt="", negative_prompt_2="grey"),
        replace(_REQUEST, id="long", prompt="a cat of many letters " * 12),
        replace(_REQUEST, id="size", width=64, height=96),
        replace(_REQUEST, id="same size", width=64, height=96, seed=3),
    ]
    family = loading.load(dev, make_settings())
    assert_matches_diffusers(family, requests, lambda request: _stock_image(pipeline, "dev", request))
    assert _bytes(family, _REQUEST) != _bytes(family, replace(_REQUEST, guidance_scale=9.0))
    images = {request.id: _bytes(family, request) for request in requests}
    assert len({images[name] for name in ("negative", "true-cfg", "no-cfg")}) == 3
    assert images["no-cfg"] == _bytes(family, replace(_REQUEST, seed=12))


def test_schnell_equals_diffusers(schnell: Path) -> None:
    pipeline = stock_pipeline(FluxPipeline, schnell)
    requests = [
        replace(_REQUEST, num_inference_steps=4),
        replace(_REQUEST, id="heun", sampler="heun"),
        replace(_REQUEST, id="euler", sampler="euler", negative_prompt="blurred"),
    ]
    family = loading.load(schnell, make_settings())
    assert_matches_diffusers(family, requests, lambda request: _stock_image(pipeline, "schnell", request))
    assert _bytes(family, _REQUEST) == _bytes(family, replace(_REQUEST, guidance_scale=9.0))


def test_defaults_are_those_of_the_variant(dev: Path, schnell: Path) -> None:
    for folder, defaults in (
        (dev, ModelDefaults(28, 3.5, 1024, 1024)),
        (schnell, ModelDefaults(4, 1.0, 1024, 1024)),
    ):
        info = loading.load(folder, make_settings()).model_info("flux")
        assert info.defaults == defaults
        assert info.capabilities == {"prompt_2", "negative_prompt", "true_cfg_scale", "loras"}
        assert info.samplers.keys() == {"euler", "heun"}


def test_sizes_are_cropped_from_multiples_of_sixteen(dev: Path) -> None:
    family = loading.load(dev, make_settings())
    cropped, full = (
        make_request(width=72, height=88, guidance_scale=3.5),
        make_request(width=80, height=96, guidance_scale=3.5),
    )
    engine = InlineEngine(family)
    engine.run(cropped, full)
    assert (pixels_of(engine.data(cropped)) == pixels_of(engine.data(full))[4:92, 4:76]).all()


def test_prompts_beyond_the_length_of_t5_are_truncated_with_a_warning(
    schnell: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family = loading.load(schnell, make_settings())
    prompt = "cats " * 100
    state = prepare_image(family, replace(_REQUEST, prompt=prompt))
    assert state.prompt_tokens == 255
    assert "to 255 tokens" in caplog.text


def test_half_precision_is_close_to_diffusers(dev: Path) -> None:
    pipeline = stock_pipeline(FluxPipeline, dev, dtype=torch.bfloat16)
    family = loading.load(dev, make_settings(dtype="bfloat16"))
    request = replace(_REQUEST, num_inference_steps=3, negative_prompt="blurred")
    assert_close_in_half_precision(generate_alone(family, request), _stock_image(pipeline, "dev", request))


def test_a_lora_equals_diffusers(dev: Path, tmp_path: Path) -> None:
    pipeline = stock_pipeline(FluxPipeline, dev)
    file = tmp_path / "style.safetensors"
    factors = random_lora(pipeline.transformer, 4, ATTENTION, seed=0)
    save_file({f"transformer.{name}": factor.contiguous() for name, factor in factors.items()}, file)
    styled = replace(_REQUEST, id="styled", loras=(("style", 0.8),))
    family = loading.load(dev, make_settings(lora=[f"style={file}"]))
    batched = InlineEngine(family)
    batched.run(styled, _REQUEST)
    assert batched.images[styled.id][0].shared_forwards > 0
    stock = stock_image(
        pipeline,
        [(file, 0.8)],
        prompt=styled.prompt,
        max_sequence_length=_LENGTH["dev"],
        **common_arguments(styled),
    )
    assert_same(generate_alone(family, styled), np.asarray(stock))
    assert_same(pixels_of(batched.data(styled)), np.asarray(stock))
    assert batched.data(styled) != batched.data(_REQUEST)
