"""Input images, masks and images of diffusers pipelines, for comparisons."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from hypergen.denoising.schedulers import SAMPLERS, find_sampler
from hypergen.request import GenerationRequest, InputImage


def sample_image(width: int = 64, height: int = 64, seed: int = 0) -> InputImage:
    """Smooth colours with a hard edge, without symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (5 + channel) + seed) + np.cos(y / (7 - channel)) for channel in range(3)]
    pixels = (np.stack(waves, axis=2) * 60 + 128).astype(np.uint8)
    pixels[height // 4 : height // 2, : width // 3] = (250, 10, 60)
    return InputImage(width, height, pixels.tobytes())


def left_half_mask(width: int = 64, height: int = 64, value: int = 255) -> InputImage:
    """A mask with a value in its left half, and 0 in the right half."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = value
    return InputImage(width, height, mask.tobytes())


def to_pillow(image: InputImage) -> Image.Image:
    mode = "RGB" if len(image.pixels) == 3 * image.width * image.height else "L"
    return Image.frombytes(mode, (image.width, image.height), image.pixels)


def pixels_of(data: bytes) -> np.ndarray:
    """Pixels of an image file, uint8, shape (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(data)))


def generate_with_diffusers(pipeline: Any, request: GenerationRequest, **arguments: Any) -> np.ndarray:
    """Pixels from any diffusers pipeline, with the request's sampler, settings and seed."""
    pipeline.set_progress_bar_config(disable=True)
    with _sampler(pipeline, request.sampler):
        image = pipeline(
            request.prompt,
            negative_prompt=request.negative_prompt,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed),
            # The pipelines' default is 0; TCD is meant for 0.3.
            eta=0.3 if request.sampler == "tcd" else 0.0,
            **arguments,
        ).images[0]
    return np.asarray(image)


def assert_same(pixels: np.ndarray, stock: np.ndarray) -> None:
    """Equal to a diffusers image, except for at most 0.1 % of the values, which may differ by 1 of 255."""
    assert pixels.shape == stock.shape
    difference = np.abs(pixels.astype(int) - stock.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.001


def record_rows(family: Any) -> tuple[list[int], Callable[[], None]]:
    """Record the number of rows of each forward pass; the returned function stops it."""
    row_counts: list[int] = []
    forward = family.forward

    def recording(*rows: Any, **named: Any) -> torch.Tensor:
        row_counts.append(len(rows[0]))
        return forward(*rows, **named)

    family.forward = recording

    def stop() -> None:
        family.forward = forward

    return row_counts, stop


@contextmanager
def _sampler(pipeline: Any, name: str | None) -> Iterator[None]:
    original = pipeline.scheduler
    if name:
        sampler = find_sampler(name, SAMPLERS)
        pipeline.scheduler = sampler.scheduler.from_config(original.config, **sampler.overrides)
    try:
        yield
    finally:
        pipeline.scheduler = original
