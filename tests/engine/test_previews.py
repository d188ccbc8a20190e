"""Previews come while an image is generated, each is closer to it, and they do not change it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hypergen.engine.previews import LatentToRgb, pred_original_sample, preview_steps
from hypergen.events import ImageFinished, Preview
from hypergen.models import loading
from tests.support.diffusers_edits import sample_image
from tests.support.samplers import SOME_NAMES
from tests.support.sync_engine import InlineEngine, make_request, make_settings, prepare_image

EMBEDDED = Path(__file__).parents[2] / "hypergen" / "embedded"


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).astype(float)


@pytest.mark.parametrize("sampler", [None, "euler", "dpmpp_2m_karras"])
def test_each_preview_is_closer_to_the_image_and_none_changes_it(sampler: str | None) -> None:
    request = make_request(
        prompt="a red circle on a blue background",
        width=128,
        height=96,
        num_inference_steps=12,
        guidance_scale=4.0,
        sampler=sampler,
        seed=3,  # one whose first preview is not closer than the second by chance
        partial_images=3,
    )
    plain = replace(request, id="plain", partial_images=0)
    engine = InlineEngine(loading.load(EMBEDDED, make_settings()))
    engine.run(request, plain)
    assert engine.data(request) == engine.data(plain)
    events = [event for request_id, event in engine.events if request_id == request.id]
    previews = sorted((e for e in events if isinstance(e, Preview)), key=lambda preview: preview.number)
    assert [preview.number for preview in previews] == [0, 1, 2]
    finished = next(e for e in events if isinstance(e, ImageFinished))
    assert all(events.index(preview) < events.index(finished) for preview in previews)
    image = _pixels(engine.data(request))
    distances = [np.abs(_pixels(preview.data) - image).mean() for preview in previews]
    assert distances == sorted(distances, reverse=True)
    assert len(set(distances)) == 3
    assert not any(
        isinstance(event, Preview) for request_id, event in engine.events if request_id == plain.id
    )


@pytest.mark.parametrize("sampler", [None, "heun"])
def test_image_to_image_has_as_many_previews(sampler: str | None) -> None:
    engine = InlineEngine(loading.load(EMBEDDED, make_settings()))
    request = make_request(
        image=sample_image(), strength=0.5, num_inference_steps=8, n=2, partial_images=3, sampler=sampler
    )
    engine.run(request)
    previews = [(event.index, event.number) for _, event in engine.events if isinstance(event, Preview)]
    assert sorted(previews) == [(index, number) for index in (0, 1) for number in (0, 1, 2)]


def test_a_failing_preview_does_not_fail_the_image() -> None:
    family = loading.load(EMBEDDED, make_settings())
    request = make_request(partial_images=1)
    engine = InlineEngine(family)

    def fail(*_: object) -> None:
        hook.remove()
        raise RuntimeError("out of memory")

    engine.probe_shapes(request)
    decoder: Any = family.vae
    hook = decoder.decoder.register_forward_pre_hook(fail)
    engine.run(request)
    assert engine.images[request.id]
    assert not any(isinstance(event, Preview) for _, event in engine.events)


def test_previews_are_spread_over_the_steps_without_the_last() -> None:
    assert sorted(preview_steps(12, 3)) == [3, 6, 9]
    assert sorted(preview_steps(8, 1)) == [4]
    assert sorted(preview_steps(2, 3)) == [1]
    assert preview_steps(1, 3) == frozenset()
    assert preview_steps(20, 0) == frozenset()


@torch.inference_mode()
@pytest.mark.parametrize("sampler", [None, *SOME_NAMES])
def test_pred_original_sample_of_the_true_noise_is_the_clean_latents(
    sd_folder: Path, sampler: str | None
) -> None:
    family = loading.load(sd_folder, make_settings())
    state = prepare_image(family, make_request(sampler=sampler, num_inference_steps=10))
    generator = torch.Generator().manual_seed(1)
    clean, noise = (torch.randn(state.latents.shape, generator=generator) for _ in range(2))
    scheduler = state.scheduler
    # In the middle, where timesteps are between training timesteps; second-order samplers begin a step.
    for _ in range(4):
        state.model_input()
        state.advance(torch.zeros_like(clean))
    timestep = state.timestep
    state.latents = scheduler.add_noise(clean, noise, timestep.reshape(1))
    assert torch.allclose(pred_original_sample(state, noise), clean, atol=0.02)


@torch.inference_mode()
def test_a_linear_map_from_latents_to_rgb() -> None:
    """It is exact if latents are linear in the colors, as those of a large VAE nearly are."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(4, 3, generator=generator)

    def encode(image: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.adaptive_avg_pool2d(image, (16, 16))
        return torch.einsum("cd,bdhw->bchw", mixing, small)

    latent_to_rgb = LatentToRgb(encode)
    image = torch.rand(1, 3, 16, 16, generator=generator) * 2 - 1
    latents = torch.einsum("cd,bdhw->bchw", mixing, image)
    assert torch.allclose(latent_to_rgb(latents), image, atol=0.02)
