"""Comparisons of a family's images, alone and in a batch, with those of a diffusers pipeline."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from hypergen.denoising.schedulers import Sampler
from hypergen.errors import RequestError
from hypergen.events import Event, Progress
from hypergen.models.family import Family
from hypergen.request import GenerationRequest
from tests.support.sync_engine import InlineEngine

# Exactly one CLIP chunk, 75 tokens, with a tokenizer of single letters.
CHUNK = " ".join(["which", "spans", "words"] * 5)


def stock_pipeline(pipeline_class: Any, folder: Any, **options: Any) -> Any:
    pipeline = pipeline_class.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def use_sampler(pipeline: Any, sampler: Sampler | None) -> Iterator[None]:
    """Replace the pipeline's scheduler inside the block; None keeps it."""
    original = pipeline.scheduler
    if sampler is not None:
        pipeline.scheduler = sampler.scheduler.from_config(original.config, **sampler.overrides)
    try:
        yield
    finally:
        pipeline.scheduler = original


def common_arguments(request: GenerationRequest) -> dict[str, Any]:
    """Arguments that all pipelines have."""
    return {
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "generator": torch.Generator().manual_seed(request.seed),
    }


def pixels_of(data: bytes) -> np.ndarray:
    """Pixels of an image file, uint8, shape (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(data)))


def assert_same(pixels: np.ndarray, stock: np.ndarray) -> None:
    """Equal to a diffusers image, except for at most 0.1 % of the values, which may differ by 1 of 255."""
    difference = np.abs(pixels.astype(int) - stock.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.001


def assert_matches_diffusers(
    family: Family,
    requests: Sequence[GenerationRequest],
    generate_with_stock: Callable[[GenerationRequest], np.ndarray],
) -> None:
    """Every image equals that of diffusers, and is the same file when generated alone and in a batch."""
    alone = generate_one_at_a_time(family, requests)
    batched = InlineEngine(family)
    batched.probe_shapes(*requests)
    batched.run(*requests)
    assert set(batched.engine.status().determinism.values()) == {"exact"}
    for request in requests:
        assert_same(pixels_of(alone.data(request)), generate_with_stock(request))
        assert batched.data(request) == alone.data(request)
        assert batched.images[request.id][0].shared_forwards > 0, request
        assert alone.images[request.id][0].shared_forwards == 0


def assert_close_in_half_precision(pixels: np.ndarray, stock: np.ndarray) -> None:
    assert np.abs(pixels.astype(int) - stock.astype(int)).mean() <= 1
    assert stock.std() > 10  # not a uniform colour


def generate_one_at_a_time(family: Family, requests: Sequence[GenerationRequest]) -> InlineEngine:
    """Run an engine that gets each request after the last step of the one before."""
    engine = InlineEngine(family)
    remaining = iter(requests[1:])

    def submit_next(_id: str, event: Event | RequestError) -> None:
        if isinstance(event, Progress) and event.step == event.steps and (request := next(remaining, None)):
            engine.submit(request)

    engine.run(requests[0], on_event=submit_next)
    return engine
