"""Img2img against diffusers' pipeline: the same image, alone and in a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionImg2ImgPipeline

from hypergen.engine.scheduler import batch_key
from hypergen.request import GenerationRequest
from tests.support.diffusers_edits import (
    assert_same,
    generate_with_diffusers,
    pixels_of,
    sample_image,
    to_pillow,
)
from tests.support.samplers import SOME_NAMES
from tests.support.sync_engine import InlineEngine, generate_alone, make_request, prepare_image


@pytest.fixture(scope="module")
def stock(parts: dict[str, Any]) -> Any:
    return StableDiffusionImg2ImgPipeline(**parts)


def _request(**changes: Any) -> GenerationRequest:
    given: dict[str, Any] = {"strength": 0.7, "num_inference_steps": 5, "guidance_scale": 1.0, **changes}
    return make_request(**{"image": sample_image(given.get("width", 64), given.get("height", 64)), **given})


def test_every_image_equals_that_of_diffusers(stock: Any, family: Any) -> None:
    requests = [_request(sampler=name) for name in [None, *SOME_NAMES]]
    requests.append(_request(sampler="heun", strength=1.0, seed=3))
    requests.append(_request(sampler="euler_a", strength=0.3, guidance_scale=5.0, negative_prompt="blurred"))
    requests.append(_request(width=96, strength=0.5, guidance_scale=5.0))
    batched = InlineEngine(family)
    batched.run(*requests)
    for request in requests:
        assert request.image is not None
        expected = generate_with_diffusers(
            stock, request, image=to_pillow(request.image), strength=request.strength
        )
        assert_same(generate_alone(family, request), expected)
        assert_same(pixels_of(batched.data(request)), expected)


def test_img2img_shares_batches_with_text_to_image_and_keeps_its_bytes(family: Any) -> None:
    img2img, text_to_image = _request(sampler="heun", guidance_scale=4.0), make_request(num_inference_steps=8)
    assert batch_key(prepare_image(family, img2img)) == batch_key(prepare_image(family, text_to_image))
    alone = [InlineEngine(family), InlineEngine(family)]
    for engine, request in zip(alone, (img2img, text_to_image), strict=True):
        engine.run(request)
    batched = InlineEngine(family)
    batched.probe_shapes(text_to_image)
    batched.run(img2img, text_to_image)
    for engine, request in zip(alone, (img2img, text_to_image), strict=True):
        assert batched.images[request.id][0].shared_forwards > 0
        assert batched.data(request) == engine.data(request)


def test_strength_is_the_share_of_steps_that_run(family: Any) -> None:
    for strength, steps in ((1.0, 5), (0.7, 3), (0.2, 1)):
        assert prepare_image(family, _request(strength=strength)).remaining_steps == steps
    # Second-order samplers run two forward passes per step, except in the last.
    assert prepare_image(family, _request(strength=0.7, sampler="heun")).remaining_steps == 5


@pytest.mark.parametrize("strength", [0.0, 0.19])
def test_strength_below_one_step_returns_the_input_image(family: Any, strength: float) -> None:
    request = _request(strength=strength, width=100, height=72, n=2)
    assert request.image is not None
    engine = InlineEngine(family)
    engine.run(request)
    for index in range(2):
        assert (pixels_of(engine.data(request, index)) == np.asarray(to_pillow(request.image))).all()
    assert engine.engine.status().forwards == 0


def test_images_of_one_request_share_one_encoding_and_differ(
    family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Any] = []
    encode = family.vae.encode
    monkeypatch.setattr(family.vae, "encode", lambda image: encoded.append(image) or encode(image))
    request = _request(n=2, image=sample_image(seed=77))
    engine, single = InlineEngine(family), InlineEngine(family)
    engine.run(request)
    assert [len(image) for image in encoded] == [1]
    second = _request(image=sample_image(seed=77), seed=request.seed + 1)
    single.run(second)
    assert engine.data(request, 1) == single.data(second)
    assert engine.data(request, 0) != engine.data(request, 1)


def test_the_input_image_keeps_its_position_at_a_larger_generation_size(family: Any) -> None:
    """The generation size is the next multiple of 8; the crop has the position of the input image."""
    small = sample_image(100, 68)
    padded = np.pad(np.asarray(to_pillow(small)), ((2, 2), (2, 2), (0, 0)), mode="edge")
    large = type(small)(104, 72, padded.tobytes())
    cropped = _request(width=100, height=68, image=small, guidance_scale=3.0)
    full = _request(width=104, height=72, image=large, guidance_scale=3.0)
    engine = InlineEngine(family)
    engine.run(cropped, full)
    assert (pixels_of(engine.data(cropped)) == pixels_of(engine.data(full))[2:70, 2:102]).all()


def test_the_metadata_has_strength_and_digest_of_the_input_image(family: Any) -> None:
    one, other = _request(strength=0.2), _request(strength=0.2, image=sample_image(seed=5))
    text_to_image = make_request()
    engine = InlineEngine(family)
    engine.run(one, other, text_to_image)
    assert b'"strength": 0.2' in engine.data(one)
    digests = [engine.data(request).partition(b'"image": "')[2][:64] for request in (one, other)]
    assert digests[0] != digests[1]
    assert b"strength" not in engine.data(text_to_image)


def test_the_work_of_a_request_counts_only_the_steps_that_run() -> None:
    assert _request(strength=0.5).work == pytest.approx(
        make_request(guidance_scale=1.0, num_inference_steps=5).work / 2
    )
