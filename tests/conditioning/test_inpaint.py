"""Inpainting against diffusers' pipeline in the generated region; the kept region equals the input image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel

from hypergen.engine.scheduler import batch_key
from hypergen.errors import InvalidRequestError
from hypergen.models import loading
from hypergen.request import GenerationRequest, InputImage
from tests.support.diffusers_edits import (
    assert_same,
    generate_with_diffusers,
    left_half_mask,
    pixels_of,
    sample_image,
    to_pillow,
)
from tests.support.samplers import SOME_NAMES
from tests.support.sync_engine import InlineEngine, generate_alone, make_request, make_settings, prepare_image


@pytest.fixture(scope="module")
def stock(parts: dict[str, Any]) -> Any:
    return StableDiffusionInpaintPipeline(**parts)


@pytest.fixture(scope="module")
def inpainting_folder(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained for inpainting: its UNet takes the mask and the kept region."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_config({**parts["unet"].config, "in_channels": 9})
    folder = tmp_path_factory.mktemp("models") / "inpainting"
    StableDiffusionInpaintPipeline(**{**parts, "unet": unet}).save_pretrained(folder)
    return folder


def _request(**changes: Any) -> GenerationRequest:
    given: dict[str, Any] = {"strength": 0.7, "num_inference_steps": 5, "guidance_scale": 1.0, **changes}
    size = (given.get("width", 64), given.get("height", 64))
    return make_request(**{"image": sample_image(*size), "mask": left_half_mask(*size), **given})


def _expected(stock: Any, request: GenerationRequest) -> np.ndarray:
    assert request.image is not None
    assert request.mask is not None
    return generate_with_diffusers(
        stock,
        request,
        image=to_pillow(request.image),
        mask_image=to_pillow(request.mask),
        strength=request.strength,
        width=request.width,
        height=request.height,
    )


def test_every_image_equals_that_of_diffusers(stock: Any, family: Any) -> None:
    requests = [_request(sampler=name) for name in [None, *SOME_NAMES]]
    requests.append(_request(sampler="euler_a", strength=1.0, guidance_scale=5.0, negative_prompt="blurred"))
    requests.append(_request(sampler="kdpm2", strength=0.4, width=96, guidance_scale=5.0))
    batched = InlineEngine(family)
    batched.run(*requests)
    for request in requests:
        assert request.image is not None
        expected = _expected(stock, request)
        assert_same(generate_alone(family, request), expected)
        kept, half = np.asarray(to_pillow(request.image)), request.width // 2
        generated = pixels_of(batched.data(request))
        assert (generated[:, half:] == kept[:, half:]).all()
        assert_same(generated[:, :half], expected[:, :half])


def test_inpainting_shares_batches_with_text_to_image_and_keeps_its_bytes(family: Any) -> None:
    request, other = _request(guidance_scale=4.0, sampler="euler_a"), make_request(num_inference_steps=8)
    assert batch_key(prepare_image(family, request)) == batch_key(prepare_image(family, other))
    alone, batched = InlineEngine(family), InlineEngine(family)
    alone.run(request)
    batched.probe_shapes(other)
    batched.run(request, other)
    assert batched.images[request.id][0].shared_forwards > 0
    assert batched.data(request) == alone.data(request)


def test_a_soft_mask_blends_the_decoded_image(family: Any) -> None:
    """A mask pixel of 128 is generated in latent space and half transparent in the decoded image."""
    hard, soft = _request(), _request(mask=left_half_mask(value=128))
    engine = InlineEngine(family)
    engine.run(hard, soft)
    assert hard.image is not None
    generated, blended = (pixels_of(engine.data(request)).astype(int) for request in (hard, soft))
    between = (generated * 128 + np.asarray(to_pillow(hard.image)).astype(int) * 127) / 255
    assert np.abs(blended - between)[:, :32].max() <= 1


def test_a_mask_without_an_input_image_is_an_error(family: Any) -> None:
    request = make_request(mask=left_half_mask())
    engine = InlineEngine(family)
    engine.run(request)
    error = engine.errors[request.id]
    assert isinstance(error, InvalidRequestError)
    assert error.param == "mask"


def test_an_inpainting_model_equals_diffusers(inpainting_folder: Path) -> None:
    family: Any = loading.load(inpainting_folder, make_settings())
    stock: Any = StableDiffusionInpaintPipeline.from_pretrained(inpainting_folder, safety_checker=None)
    # Without a mask the whole image is generated, without an input image from grey.
    everything = InputImage(64, 64, b"\xff" * 64 * 64)
    grey = InputImage(64, 64, b"\x80" * 3 * 64 * 64)
    requests = [
        (_request(sampler="ddpm"), {}),
        (_request(guidance_scale=5.0, strength=1.0, sampler="euler_a"), {}),
        (_request(mask=None), {"mask": everything}),
        (_request(mask=None, image=None, strength=0.2), {"mask": everything, "image": grey, "strength": 1.0}),
    ]
    batched = InlineEngine(family)
    batched.run(*(request for request, _ in requests))
    for request, changes in requests:
        values = {name: getattr(request, name) for name in GenerationRequest.__slots__}
        expected = _expected(stock, GenerationRequest(**{**values, **changes}))
        assert_same(generate_alone(family, request), expected)
        assert_same(pixels_of(batched.data(request))[:, :32], expected[:, :32])
