"""Requests of many kinds with several samplers on the fake CUDA device: images equal those of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypergen.events import Preview
from hypergen.models import loading
from hypergen.request import GenerationRequest, InputImage
from tests.support.compare_devices import assert_close, input_image, make_engine
from tests.support.fake_cuda import fake_cuda
from tests.support.sync_engine import InlineEngine, make_request, make_settings


def _mask(side: int = 64) -> InputImage:
    right_half = np.repeat((np.arange(side)[None] >= side // 2).astype(np.uint8) * 255, side, 0)
    return InputImage(side, side, right_half.tobytes())


_CONDITIONS: dict[str, dict[str, Any]] = {
    "image to image": {"image": input_image(1), "strength": 0.6},
    "inpainting": {"image": input_image(2), "mask": _mask(), "strength": 0.9},
    "unguided": {"guidance_scale": 1.0},
    "long prompt": {"prompt": "a cat and another cat " * 30},
    "previews": {"partial_images": 2},
}


@pytest.fixture(scope="module")
def engines(sd_folder: Path) -> Iterator[tuple[InlineEngine, InlineEngine]]:
    """On the fake device and on the CPU, for one sampler after another."""
    # What libraries import at a first load must not see the fake device.
    loading.load(sd_folder, make_settings())
    with fake_cuda():
        engines = make_engine(sd_folder, "cuda"), make_engine(sd_folder, "cpu")
        yield engines
        for engine in engines:
            engine.engine.close()


@pytest.mark.parametrize(
    "sampler", [None, "euler_a", "dpmpp_2m_karras", "dpmpp_3m_sde_exponential", "heun", "unipc_beta"]
)
def test_conditions_give_the_images_of_the_cpu(
    engines: tuple[InlineEngine, InlineEngine], sampler: str | None
) -> None:
    requests = {
        condition: make_request(num_inference_steps=6, sampler=sampler, **changes)
        for condition, changes in _CONDITIONS.items()
    }
    cuda, cpu = engines
    for engine in engines:
        engine.generate(*requests.values())
        assert not engine.errors
    for request in requests.values():
        assert_close(cuda, cpu, request)
        ours, theirs = _previews(cuda, request), _previews(cpu, request)
        assert len(ours) == len(theirs) == request.partial_images
        for one, other in zip(ours, theirs, strict=True):
            assert np.abs(one - other).max() <= 2


def _previews(engine: InlineEngine, request: GenerationRequest) -> list[np.ndarray]:
    return [
        np.asarray(Image.open(BytesIO(event.data))).astype(int)
        for request_id, event in engine.events
        if request_id == request.id and isinstance(event, Preview)
    ]
