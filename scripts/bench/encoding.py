"""The time to encode PNG files."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from hypergen.images import encoding
from scripts.bench.jobs import Job
from scripts.bench.policies import request_for

SIDE = 1024
_REPEATS = 9
# Cells per side of each random field. The amplitude is inversely proportional to them, as in the spectrum of
# photographs.
_FIELDS = (2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Encoding:
    """The encoding of one image as PNG.

    Attributes:
        image: its name, for example "photo-like".
        cpu_ms: median CPU time of the encoding thread.
    """

    image: str
    cpu_ms: float
    megabytes: float


def measure() -> list[Encoding]:
    """Encode images of 1024x1024, from easy to hard."""
    images = {"flat": flat(), "photo-like": photo_like(), "noise": noise()}
    request = request_for(Job(0, 0, 20, 5.0), SIDE)
    measured: list[Encoding] = []
    for name, pixels in images.items():
        seconds: list[float] = []
        file = encoding.encode_image(pixels, request, 0, "benchmark")  # warm-up: allocates memory
        for _ in range(_REPEATS):
            started = time.thread_time()
            encoding.encode_image(pixels, request, 0, "benchmark")
            seconds.append(time.thread_time() - started)
        measured.append(Encoding(name, statistics.median(seconds) * 1000, len(file) / 1e6))
    return measured


def flat() -> np.ndarray:
    return np.full((SIDE, SIDE, 3), 128, np.uint8)


def photo_like() -> np.ndarray:
    """Smooth random fields of several scales plus fine noise, as of a camera sensor; deterministic."""
    rng = np.random.default_rng(0)
    brightness = sum(_field(rng, cells) / cells for cells in _FIELDS)
    spread = 128 + 55 * (brightness - np.mean(brightness)) / np.std(brightness)
    return np.clip(spread + rng.normal(0, 1.5, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def _field(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Random RGB values, smoothly interpolated between cells, shape (SIDE, SIDE, 3)."""
    return np.stack(list(_channels(rng, cells)), axis=-1)


def _channels(rng: np.random.Generator, cells: int) -> Iterator[np.ndarray]:
    common = rng.normal(size=(cells, cells))  # the color channels of photographs are correlated
    for _ in range(3):
        grid = (common + 0.3 * rng.normal(size=(cells, cells))).astype(np.float32)
        yield np.asarray(Image.fromarray(grid).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
