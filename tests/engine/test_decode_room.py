"""Forward passes leave the memory that decoding needs, on the fake device."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hypergen.engine.batch_invariance.bucket_store import BucketStore
from hypergen.models import loading
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.sync_engine import InlineEngine, make_request, make_settings

_SIZE = "128x128"  # the model's default


def _warm_engine(folder: Path, buckets: BucketStore) -> InlineEngine:
    settings = {"device": "cuda", "cuda_graphs": False}
    engine = InlineEngine(loading.load(folder, make_settings(**settings)), buckets=buckets, **settings)
    engine.engine.warm_up()
    return engine


def _bytes_of_decode(engine: InlineEngine, device: FakeCuda) -> int:
    before = device.peak = device.allocated
    with torch.inference_mode():
        engine.engine.family.vae.decode(torch.zeros(1, 4, 16, 16, device="cuda"))
    return device.peak - before


@dataclass(frozen=True)
class _Memory:
    """What a batch of 16 rows takes with the weights, and what decoding takes, in bytes; and its buckets."""

    with_largest_batch: int
    of_decode: int
    buckets: Path


@pytest.fixture(scope="module")
def memory(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> _Memory:
    loading.load(sd_folder, make_settings())  # what libraries import must not see the fake device
    file = tmp_path_factory.mktemp("memory") / "buckets.json"
    with fake_cuda() as device:
        engine = _warm_engine(sd_folder, BucketStore(file, {}))
        with_largest_batch = device.peak
        assert engine.engine.status().row_counts[_SIZE] == (16,)
        return _Memory(with_largest_batch, _bytes_of_decode(engine, device), file)


@pytest.mark.parametrize(("decodes", "bucket"), [(1.5, 16), (0.5, 8)])
@pytest.mark.parametrize("kept", [False, True], ids=["new", "chosen with more memory"])
def test_a_batch_leaves_room_for_decoding(
    sd_folder: Path, memory: _Memory, decodes: float, bucket: int, kept: bool, tmp_path: Path
) -> None:
    file = tmp_path / "buckets.json"
    if kept:
        shutil.copyfile(memory.buckets, file)
    with fake_cuda(int(memory.with_largest_batch + decodes * memory.of_decode)) as device:
        engine = _warm_engine(sd_folder, BucketStore(file, {}))
        assert engine.engine.status().row_counts[_SIZE] == (bucket,)
        assert device.memory_limit == device.total_memory  # for all but forward passes
        request = make_request(width=128, height=128)
        engine.run(request)
        assert not engine.errors
        assert engine.engine.status().row_counts[_SIZE] == (bucket,)
