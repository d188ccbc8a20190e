"""Picture to picture against diffusers' own pipeline: the same picture, alone and in a crowd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionImg2ImgPipeline

from hypergen.denoising.schedulers import SAMPLERS
from hypergen.engine.scheduler import batch_key
from hypergen.request import GenerationRequest
from tests.support.diffusers_edits import (
    assert_same,
    generate_with_diffusers,
    pixels_of,
    sample_image,
    to_pillow,
)
from tests.support.sync_engine import InlineEngine, generate_alone, make_request, prepare_image


@pytest.fixture(scope="module")
def stock(parts: dict[str, Any]) -> Any:
    return StableDiffusionImg2ImgPipeline(**parts)


def _request(**changes: Any) -> GenerationRequest:
    given: dict[str, Any] = {"strength": 0.7, "num_inference_steps": 5, "guidance_scale": 1.0, **changes}
    return make_request(**{"image": sample_image(given.get("width", 64), given.get("height", 64)), **given})


def test_every_picture_is_that_of_the_stock_pipeline(stock: Any, family: Any) -> None:
    requests = [_request(sampler=name) for name in [None, *SAMPLERS]]
    requests.append(_request(sampler="heun", strength=1.0, seed=3))
    requests.append(_request(sampler="euler_a", strength=0.3, guidance_scale=5.0, negative_prompt="blurred"))
    requests.append(_request(width=96, strength=0.5, guidance_scale=5.0))
    crowd = InlineEngine(family)
    crowd.run(*requests)
    for request in requests:
        assert request.image is not None
        expected = generate_with_diffusers(
            stock, request, image=to_pillow(request.image), strength=request.strength
        )
        assert_same(generate_alone(family, request), expected)
        assert_same(pixels_of(crowd.data(request)), expected)


def test_it_shares_passes_with_text_to_image_and_keeps_its_bytes(family: Any) -> None:
    changed, drawn = _request(sampler="heun", guidance_scale=4.0), make_request(num_inference_steps=8)
    assert batch_key(prepare_image(family, changed)) == batch_key(prepare_image(family, drawn))
    alone = [InlineEngine(family), InlineEngine(family)]
    for engine, request in zip(alone, (changed, drawn), strict=True):
        engine.run(request)
    crowd = InlineEngine(family)
    crowd.probe_shapes(drawn)
    crowd.run(changed, drawn)
    for engine, request in zip(alone, (changed, drawn), strict=True):
        assert crowd.images[request.id][0].shared_forwards > 0
        assert crowd.data(request) == engine.data(request)


def test_only_the_steps_that_strength_leaves_are_taken(family: Any) -> None:
    for strength, steps in ((1.0, 5), (0.7, 3), (0.2, 1)):
        assert prepare_image(family, _request(strength=strength)).remaining_steps == steps
    # The second order samplers evaluate twice, except in the last step.
    assert prepare_image(family, _request(strength=0.7, sampler="heun")).remaining_steps == 5


@pytest.mark.parametrize("strength", [0.0, 0.19])
def test_too_little_strength_for_one_step_gives_the_picture_back(family: Any, strength: float) -> None:
    request = _request(strength=strength, width=100, height=72, n=2)
    assert request.image is not None
    engine = InlineEngine(family)
    engine.run(request)
    for index in range(2):
        assert (pixels_of(engine.data(request, index)) == np.asarray(to_pillow(request.image))).all()
    assert engine.engine.status().forwards == 0


def test_pictures_of_one_request_are_encoded_once_and_differ(
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


def test_a_picture_stays_in_its_place_where_a_larger_one_is_drawn(family: Any) -> None:
    """The drawn size is the next multiple of 8; what is cut from its middle is where the picture was."""
    small = sample_image(100, 68)
    padded = np.pad(np.asarray(to_pillow(small)), ((2, 2), (2, 2), (0, 0)), mode="edge")
    large = type(small)(104, 72, padded.tobytes())
    cut = _request(width=100, height=68, image=small, guidance_scale=3.0)
    whole = _request(width=104, height=72, image=large, guidance_scale=3.0)
    engine = InlineEngine(family)
    engine.run(cut, whole)
    assert (pixels_of(engine.data(cut)) == pixels_of(engine.data(whole))[2:70, 2:102]).all()


def test_the_file_says_which_picture_it_was_made_from(family: Any) -> None:
    one, other = _request(strength=0.2), _request(strength=0.2, image=sample_image(seed=5))
    drawn = make_request()
    engine = InlineEngine(family)
    engine.run(one, other, drawn)
    assert b'"strength": 0.2' in engine.data(one)
    digests = [engine.data(request).partition(b'"image": "')[2][:64] for request in (one, other)]
    assert digests[0] != digests[1]
    assert b"strength" not in engine.data(drawn)


def test_the_work_of_a_request_is_that_of_the_steps_it_takes() -> None:
    assert _request(strength=0.5).work == pytest.approx(
        make_request(guidance_scale=1.0, num_inference_steps=5).work / 2
    )
