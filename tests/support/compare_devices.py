"""Engines of one model on several devices, and their images."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hypergen.models import loading
from hypergen.request import GenerationRequest, InputImage
from tests.support.sync_engine import InlineEngine, make_settings


def make_engine(folder: Path, device: str, **settings: Any) -> InlineEngine:
    family = loading.load(folder, make_settings(device=device, **settings))
    return InlineEngine(family, device=device, **settings)


def load_loras(engine: InlineEngine, *names: str) -> Any:
    """Load LoRAs for as long as the result is kept, so that their images start with the others."""
    manager = engine.engine.family.lora_manager
    assert manager is not None
    return manager.load(tuple((name, 1.0) for name in names))


def pixels(engine: InlineEngine, request: GenerationRequest) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(engine.data(request)))).astype(int)


def assert_close(accelerator: InlineEngine, cpu: InlineEngine, request: GenerationRequest) -> None:
    """An image of the device differs from the CPU's by the rounding of single values."""
    difference = np.abs(pixels(accelerator, request) - pixels(cpu, request)).max()
    assert difference <= 1, (request.id, request.sampler, request.loras)


def input_image(seed: int, side: int = 64) -> InputImage:
    noise = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return InputImage(side, side, noise.tobytes())
