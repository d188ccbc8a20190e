"""What diffusers' own pipelines draw, to compare with."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from hypergen.denoising.schedulers import SAMPLERS
from hypergen.request import GenerationRequest, InputImage


def picture(width: int = 64, height: int = 64, seed: int = 0) -> InputImage:
    """Smooth colours with a hard edge, and nothing in it that is symmetric."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (5 + channel) + seed) + np.cos(y / (7 - channel)) for channel in range(3)]
    pixels = (np.stack(waves, axis=2) * 60 + 128).astype(np.uint8)
    pixels[height // 4 : height // 2, : width // 3] = (250, 10, 60)
    return InputImage(width, height, pixels.tobytes())


def left_half(width: int = 64, height: int = 64, drawn: int = 255) -> InputImage:
    """A mask of which the left half is drawn."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = drawn
    return InputImage(width, height, mask.tobytes())


def to_pillow(sent: InputImage) -> Image.Image:
    mode = "RGB" if len(sent.pixels) == 3 * sent.width * sent.height else "L"
    return Image.frombytes(mode, (sent.width, sent.height), sent.pixels)


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def draw(pipeline: Any, request: GenerationRequest, **arguments: Any) -> np.ndarray:
    """The picture of a diffusers pipeline of any kind, with the request's sampler, settings and seed."""
    pipeline.set_progress_bar_config(disable=True)
    with _sampler(pipeline, request.sampler):
        drawn = pipeline(
            request.prompt,
            negative_prompt=request.negative_prompt,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed),
            # The pipelines have 0 of their own, TCD was made for 0.3.
            eta=0.3 if request.sampler == "tcd" else 0.0,
            **arguments,
        ).images[0]
    return np.asarray(drawn)


def assert_same(drawn: np.ndarray, stock: np.ndarray) -> None:
    assert drawn.shape == stock.shape
    difference = np.abs(drawn.astype(int) - stock.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.001


def sizes_of_passes(family: Any) -> tuple[list[int], Callable[[], None]]:
    """Records the rows of each pass from now on; the function ends it."""
    rows_seen: list[int] = []
    forward = family.forward

    def recording(*rows: Any, **named: Any) -> torch.Tensor:
        rows_seen.append(len(rows[0]))
        return forward(*rows, **named)

    family.forward = recording

    def end() -> None:
        family.forward = forward

    return rows_seen, end


@contextmanager
def _sampler(pipeline: Any, name: str | None) -> Iterator[None]:
    published = pipeline.scheduler
    if name:
        sampler = SAMPLERS[name]
        pipeline.scheduler = sampler.scheduler.from_config(published.config, **sampler.overrides)
    try:
        yield
    finally:
        pipeline.scheduler = published
