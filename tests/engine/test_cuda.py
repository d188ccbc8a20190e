"""The whole engine on the fake CUDA device: images equal those of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypergen.models import loading
from hypergen.request import GenerationRequest
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.small_models import save_flux, save_sd, save_sd3, save_sdxl
from tests.support.sync_engine import InlineEngine, make_request, make_settings

_SAVE = {"sd": save_sd, "sdxl": save_sdxl, "flux": save_flux, "sd3": save_sd3}


@pytest.fixture(scope="module", params=_SAVE)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _SAVE[request.param](tmp_path_factory.mktemp("cuda") / request.param)


@pytest.fixture
def device() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


def _engine(folder: Path, device: str, **settings: Any) -> InlineEngine:
    family = loading.load(folder, make_settings(device=device, **settings))
    return InlineEngine(family, device=device, **settings)


def _pixels(engine: InlineEngine, request: GenerationRequest) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(engine.data(request)))).astype(int)


def _assert_equal(folder: Path, cuda: InlineEngine, *requests: GenerationRequest) -> None:
    """Images of the device differ from the CPU's by the rounding of single values."""
    cpu = _engine(folder, "cpu")
    cpu.run(*requests)
    for request in requests:
        assert np.abs(_pixels(cuda, request) - _pixels(cpu, request)).max() <= 1


def test_images_are_those_of_the_cpu(folder: Path) -> None:
    requests = [make_request(seed=seed, num_inference_steps=steps) for seed, steps in ((1, 4), (2, 6))]
    with fake_cuda():
        engine = _engine(folder, "cuda")
        engine.engine.warm_up()
        engine.run(*requests)
        assert not engine.errors
    _assert_equal(folder, engine, *requests)
