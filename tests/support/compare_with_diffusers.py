"""What the tests of the families have in common: diffusers' picture, ours alone, and ours in a crowd."""

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

# Exactly a chunk of CLIP's for a tokenizer that knows only letters: 75 tokens.
CHUNK = " ".join(["which", "spans", "words"] * 5)


def stock_pipeline(pipeline_class: Any, folder: Any, **options: Any) -> Any:
    pipeline = pipeline_class.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def sampler_of(pipeline: Any, sampler: Sampler | None) -> Iterator[None]:
    """The pipeline with another scheduler; None leaves its own."""
    published = pipeline.scheduler
    if sampler is not None:
        pipeline.scheduler = sampler.scheduler.from_config(published.config, **sampler.overrides)
    try:
        yield
    finally:
        pipeline.scheduler = published


def common_arguments(request: GenerationRequest) -> dict[str, Any]:
    """What every pipeline's call is told in the same words."""
    return {
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "generator": torch.Generator().manual_seed(request.seed),
    }


def picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def assert_same(picture: np.ndarray, stock: np.ndarray) -> None:
    difference = np.abs(picture.astype(int) - stock.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.001


def assert_drawn_as_by_stock(
    family: Family,
    requests: Sequence[GenerationRequest],
    draw_with_stock: Callable[[GenerationRequest], np.ndarray],
) -> None:
    """Every picture is diffusers', drawn alone and in a crowd; both are the same file, byte for byte."""
    lone = draw_one_after_another(family, requests)
    crowd = InlineEngine(family)
    crowd.know(*requests)
    crowd.run(*requests)
    assert set(crowd.engine.status().determinism.values()) == {"exact"}
    for request in requests:
        assert_same(picture(lone.data(request)), draw_with_stock(request))
        assert crowd.data(request) == lone.data(request)
        assert crowd.images[request.id][0].shared_forwards > 0, request
        assert lone.images[request.id][0].shared_forwards == 0


def assert_close_in_half_precision(picture: np.ndarray, stock: np.ndarray) -> None:
    assert np.abs(picture.astype(int) - stock.astype(int)).mean() <= 1
    assert stock.std() > 10  # it is a picture, and not all of one colour


def draw_one_after_another(family: Family, requests: Sequence[GenerationRequest]) -> InlineEngine:
    engine = InlineEngine(family)
    coming = iter(requests[1:])

    def bring_the_next(_id: str, event: Event | RequestError) -> None:
        if isinstance(event, Progress) and event.step == event.steps and (request := next(coming, None)):
            engine.submit(request)

    engine.run(requests[0], on_event=bring_the_next)
    return engine
