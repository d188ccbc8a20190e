"""Buckets stay what they were, across restarts, engines and damaged files."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from hypergen.engine.batch_invariance.bucket_store import BucketStore

_KEY = {"model": "sdxl", "device": "Some GPU", "torch": "2.13.0"}


def test_a_bucket_outlives_the_process(tmp_path: Path) -> None:
    file = tmp_path / "buckets.json"
    assert BucketStore(file, _KEY).put("64x64", 8) == 8
    assert BucketStore(file, _KEY).get("64x64") == 8
    assert BucketStore(file, _KEY).get("128x128") is None
    assert BucketStore(file, {**_KEY, "torch": "2.14.0"}).get("64x64") is None


def test_the_first_engine_decides(tmp_path: Path) -> None:
    file = tmp_path / "buckets.json"
    first, second = BucketStore(file, _KEY), BucketStore(file, _KEY)
    assert first.put("64x64", 4) == 4
    assert second.put("64x64", 8) == 4
    assert second.get("64x64") == 4


def _put_many(file: Path, start: int) -> None:
    for number in range(start, start + 20):
        BucketStore(file, _KEY).put(str(number), number)


def test_engines_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "buckets.json"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_put_many, args=(file, start)) for start in (0, 20)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    store = BucketStore(file, _KEY)
    assert [store.get(str(number)) for number in range(40)] == list(range(40))


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_file_is_replaced(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "buckets.json"
    file.write_text(content)
    assert BucketStore(file, _KEY).put("64x64", 8) == 8
    assert BucketStore(file, _KEY).get("64x64") == 8
    assert "buckets.json" in caplog.text


def test_a_place_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    store = BucketStore(tmp_path / "file" / "buckets.json", _KEY)
    assert store.put("64x64", 8) == 8
    assert store.get("64x64") == 8
    assert "Cannot keep" in caplog.text


def test_without_a_file_nothing_is_kept() -> None:
    store = BucketStore(None, _KEY)
    assert store.put("64x64", 8) == 8
    assert store.get("64x64") == 8
    assert BucketStore(None, _KEY).get("64x64") is None
