"""The whole engine on the fake CUDA device: images equal those of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hypergen.engine.batch_invariance.bucket_store import BucketStore
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


# Kernels whose bits change with the row count, as those of GPUs do: the row counts with equal bits.
_KERNELS: dict[str, Callable[[int], int]] = {
    "1 | 2 or more": lambda rows: min(rows, 2),
    "1, 2 | 3 or more": lambda rows: 0 if rows <= 2 else 1,
    "1, 2 | 3, 4 | 5 to 8 | 9 to 16": lambda rows: (rows - 1).bit_length() or 1,
    "1 | 2 | 3, 4 | 5 to 8 | 9 to 16": lambda rows: (rows - 1).bit_length(),
}


class _PretendedKernels:
    """Lets forward passes give other bits for other row counts, and cost what they should."""

    def __init__(self, family: Any, kernel: Callable[[int], int], cost: Callable[[int], float]) -> None:
        self.now = 0.0
        self.row_counts: list[int] = []
        self._forward, self._kernel, self._cost = family.forward, kernel, cost
        family.forward = self

    def __call__(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = len(latents)
        self.row_counts.append(rows)
        self.now += self._cost(rows)
        return self._forward(latents, *args, **kwargs) * (1 + 1e-3 * self._kernel(rows))

    def clock(self) -> float:
        return self.now


def _pretending(
    folder: Path, kernel: Callable[[int], int], cost: Callable[[int], float], **settings: Any
) -> tuple[InlineEngine, _PretendedKernels]:
    family = loading.load(folder, make_settings(device="cuda", **settings))
    kernels = _PretendedKernels(family, kernel, cost)
    engine = InlineEngine(family, clock=kernels.clock, device="cuda", **settings)
    engine.engine.warm_up()
    return engine, kernels


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("kernel", _KERNELS)
def test_batches_are_shared_and_bit_exact_whatever_the_kernels(
    sd_folder: Path, device: FakeCuda, kernel: str, seeded: bool
) -> None:
    requests = [make_request(seed=seed, seed_given=seeded) for seed in range(8)]
    batched, kernels = _pretending(sd_folder, _KERNELS[kernel], lambda _rows: 0.02)
    batched.run(*requests)
    status = batched.engine.status()
    assert status.determinism == {"64x64": "exact", "128x128": "exact"}
    assert status.row_counts == {"64x64": (16,), "128x128": (16,)}
    assert status.image_steps / status.forwards >= 4
    assert set(kernels.row_counts[-4:]) == {16}
    alone, _ = _pretending(sd_folder, _KERNELS[kernel], lambda _rows: 0.02)
    alone.run(requests[3])
    assert alone.data(requests[3]) == batched.data(requests[3])


@pytest.mark.parametrize(
    ("cost", "bucket"),
    [
        (lambda _rows: 0.02, 16),
        (lambda rows: 0.02 * (1.0 if rows <= 4 else 2.0), 4),
        (lambda rows: 0.01 * rows, 2),
        (lambda rows: 0.02 + 0.002 * (rows - 2), 4),  # 1.2 times the cost of one image; 8 rows 1.6 times
    ],
)
def test_the_bucket_is_as_large_as_costs_little_more(
    sd_folder: Path, device: FakeCuda, cost: Callable[[int], float], bucket: int
) -> None:
    engine, _ = _pretending(sd_folder, _KERNELS["1 | 2 | 3, 4 | 5 to 8 | 9 to 16"], cost)
    assert engine.engine.status().row_counts == {"128x128": (bucket,)}


def test_a_bucket_is_not_chosen_again(sd_folder: Path, device: FakeCuda, tmp_path: Path) -> None:
    def start(cost: Callable[[int], float]) -> dict[str, tuple[int, ...]]:
        family = loading.load(sd_folder, make_settings(device="cuda"))
        kernels = _PretendedKernels(family, lambda _rows: 0, cost)
        buckets = BucketStore(tmp_path / "buckets.json", {})
        engine = InlineEngine(family, clock=kernels.clock, buckets=buckets, device="cuda")
        engine.engine.warm_up()
        return engine.engine.status().row_counts

    assert start(lambda _rows: 0.02) == {"128x128": (16,)}
    assert start(lambda rows: 0.01 * rows) == {"128x128": (16,)}


def test_rows_that_depend_on_their_position_get_a_smaller_bucket(sd_folder: Path, device: FakeCuda) -> None:
    family = loading.load(sd_folder, make_settings(device="cuda"))
    forward = family.forward

    def position_dependent(latents: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = forward(latents, *args, **kwargs)
        if len(latents) > 4:
            output[0] *= 1.001
        return output

    family.forward = position_dependent
    engine = InlineEngine(family, device="cuda")
    engine.engine.warm_up()
    assert engine.engine.status().row_counts == {"128x128": (4,)}
    assert engine.engine.status().determinism == {"128x128": "exact"}


def test_a_batch_that_is_out_of_memory_gets_a_smaller_bucket(sd_folder: Path, device: FakeCuda) -> None:
    memory = 16  # rows that fit

    def cost(rows: int) -> float:
        if rows > memory:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 0.02

    engine, kernels = _pretending(sd_folder, lambda _rows: 0, cost)
    memory = 8
    engine.run(*(make_request(seed=seed, width=128, height=128) for seed in range(8)))
    assert not engine.errors
    assert engine.engine.status().row_counts["128x128"] == (8,)
    assert kernels.row_counts[-1] == 8


def test_fast_mode_pads_nothing(sd_folder: Path, device: FakeCuda) -> None:
    engine, kernels = _pretending(sd_folder, lambda _rows: 0, lambda _rows: 0.02, determinism="fast")
    engine.run(make_request())
    assert engine.engine.status().row_counts == {}
    assert kernels.row_counts[-1] == 2
