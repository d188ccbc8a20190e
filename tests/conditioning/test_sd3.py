"""Img2img and inpainting with Stable Diffusion 3 against diffusers' pipelines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)

from hypergen.denoising.schedulers import FLOW_SAMPLERS, find_sampler
from hypergen.engine.postprocess import to_pixels
from hypergen.models import loading
from hypergen.request import GenerationRequest
from tests.support.compare_with_diffusers import (
    assert_matches_diffusers,
    common_arguments,
    generate_one_at_a_time,
    use_sampler,
)
from tests.support.diffusers_edits import assert_same, left_half_mask, pixels_of, sample_image, to_pillow
from tests.support.small_models import save_sd3
from tests.support.sync_engine import InlineEngine, generate_alone, make_request, make_settings, prepare_image

_IMG2IMG = make_request(
    image=sample_image(), strength=0.7, num_inference_steps=5, negative_prompt="blurred", seed=11
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("models") / "small-sd3", channels=16)


@pytest.fixture(scope="module")
def parts(folder: Path) -> dict[str, Any]:
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(folder)
    return pipeline.components


@pytest.fixture(scope="module")
def family(folder: Path) -> Any:
    return loading.load(folder, make_settings())


def _stock_image(pipeline: Any, request: GenerationRequest, **arguments: Any) -> Any:
    assert request.image is not None
    pipeline.set_progress_bar_config(disable=True)
    with use_sampler(pipeline, find_sampler(request.sampler, FLOW_SAMPLERS) if request.sampler else None):
        return pipeline(
            request.prompt,
            negative_prompt=request.negative_prompt,
            image=to_pillow(request.image),
            strength=request.strength,
            **common_arguments(request),
            **arguments,
        ).images[0]


def test_every_image_equals_that_of_diffusers(parts: dict[str, Any], family: Any) -> None:
    pipeline = StableDiffusion3Img2ImgPipeline(**parts)
    requests = [
        _IMG2IMG,
        replace(_IMG2IMG, id="heun", sampler="heun", strength=0.5, seed=3),
        replace(_IMG2IMG, id="exponential", sampler="euler_exponential", strength=0.6),
        replace(_IMG2IMG, id="euler", sampler="euler", guidance_scale=1.0, strength=0.9),
        replace(_IMG2IMG, id="whole", strength=1.0),
        # A fraction of a step runs as one step, as in diffusers.
        replace(_IMG2IMG, id="less than a step", strength=0.05),
    ]
    assert_matches_diffusers(family, requests, lambda request: np.asarray(_stock_image(pipeline, request)))


def test_the_kept_region_is_restored_as_in_diffusers(parts: dict[str, Any], family: Any) -> None:
    """diffusers decodes without the shift of the latents, so its latents are compared."""
    pipeline = StableDiffusion3InpaintPipeline(**parts)
    masked = replace(_IMG2IMG, mask=left_half_mask())
    requests = [
        masked,
        replace(masked, id="heun", sampler="heun", seed=3),
        replace(masked, id="whole", strength=1.0, guidance_scale=1.0),
    ]
    alone, batched = generate_one_at_a_time(family, requests), InlineEngine(family)
    batched.probe_shapes(*requests)
    batched.run(*requests)
    for request in requests:
        assert request.image is not None
        assert request.mask is not None
        latents = _stock_image(pipeline, request, mask_image=to_pillow(request.mask), output_type="latent")
        state = prepare_image(family, request)
        with torch.inference_mode():
            stock = to_pixels(family.decode(replace(state, latents=latents[None]))).numpy()
        assert_same(generate_alone(family, request), stock)
        generated, kept = pixels_of(batched.data(request)), np.asarray(to_pillow(request.image))
        assert (generated[:, 32:] == kept[:, 32:]).all()
        assert_same(generated[:, :32], stock[:, :32])
        assert batched.data(request) == alone.data(request)
        assert batched.images[request.id][0].shared_forwards > 0


def test_a_larger_strength_changes_the_image_more(family: Any) -> None:
    """Compared with the smallest strength, since a random VAE does not reproduce its input."""
    requests = [replace(_IMG2IMG, num_inference_steps=10, strength=s) for s in (0.1, 0.3, 0.6, 1.0)]
    images = [generate_alone(family, request).astype(int) for request in requests]
    changes = [np.abs(image - images[0]).mean() for image in images]
    assert changes == sorted(changes)
    assert len(set(changes)) == len(requests)


def test_strength_zero_returns_the_input_image(family: Any) -> None:
    image = sample_image(72, 88)
    request = replace(_IMG2IMG, image=image, width=72, height=88, strength=0.0)
    engine = InlineEngine(family)
    engine.run(request)
    assert (pixels_of(engine.data(request)) == np.asarray(to_pillow(image))).all()
    assert engine.engine.status().forwards == 0
