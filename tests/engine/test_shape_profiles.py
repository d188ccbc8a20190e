"""When larger batches are probed."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hypergen.engine.batch_invariance.shape_profiles import ShapeProfiles
from hypergen.engine.scheduler import batch_key
from hypergen.models import loading
from tests.support.small_models import save_refiner, save_sdxl
from tests.support.sync_engine import InlineEngine, make_request, make_settings, prepare_image


@pytest.fixture
def family(sd_folder: Path) -> Any:
    return loading.load(sd_folder, make_settings())


def _shape_profiles(family: Any, seconds: float) -> ShapeProfiles:
    """With a clock that measures `seconds` for every forward pass."""
    ticks: Iterator[float] = (tick * seconds for tick in itertools.count())
    return ShapeProfiles(family, make_settings(), lambda: next(ticks))


@torch.inference_mode()
@pytest.mark.parametrize(("seconds", "is_probed"), [(0.01, True), (1.0, False)])
def test_an_idle_engine_continues_a_probe_only_if_forward_passes_are_short(
    family: Any, seconds: float, is_probed: bool
) -> None:
    profiles = _shape_profiles(family, seconds)
    one, another = (prepare_image(family, make_request(), index) for index in range(2))
    list(profiles.probe_minimum(one))
    assert (profiles.next_pending_probe(()) is not None) == is_probed
    assert profiles.next_pending_probe([one]) is None  # one guided image: two rows, which are already probed
    assert profiles.next_pending_probe([one, another]) is not None


@torch.inference_mode()
def test_finish_probes_ignores_the_time_of_forward_passes(family: Any) -> None:
    profiles = _shape_profiles(family, 1.0)
    one = prepare_image(family, make_request())
    list(profiles.probe_minimum(one))
    assert profiles.costs[batch_key(one)].row_counts == {1, 2}
    profiles.finish_probes()
    assert {1, 2, 4, 8} <= (profiles.costs[batch_key(one)].row_counts or set())
    assert profiles.next_pending_probe([one] * 20) is None


@torch.inference_mode()
def test_a_probe_runs_one_forward_pass_at_a_time(family: Any) -> None:
    profiles = _shape_profiles(family, 0.01)
    list(profiles.probe_minimum(prepare_image(family, make_request())))
    row_counts: list[int] = []
    family.denoiser.register_forward_hook(lambda _module, inputs, _output: row_counts.append(len(inputs[0])))
    while key := profiles.next_pending_probe(()):
        before = len(row_counts)
        profiles.continue_probe(key)
        assert len(row_counts) <= before + 1
    assert sorted(set(row_counts)) == [3, 4, 6, 8, 12, 16]
    assert row_counts == sorted(row_counts)


@torch.inference_mode()
def test_at_most_eight_unfinished_probes_keep_tensors_and_paused_ones_continue_when_needed(
    family: Any,
) -> None:
    profiles = _shape_profiles(family, 1.0)  # no forward pass is short enough for an idle engine
    requests = [make_request(width=width) for width in range(64, 64 + 8 * 10, 8)]
    images = [prepare_image(family, request) for request in requests]
    first = batch_key(images[0])
    references = [weakref.ref(image) for image in images]
    while images:
        list(profiles.probe_minimum(images.pop(0)))
    gc.collect()
    assert [reference() is not None for reference in references] == [False] * 2 + [True] * 8

    again = prepare_image(family, requests[0])
    list(profiles.probe_minimum(again))
    assert profiles.costs[first].row_counts == {1, 2}
    while profiles.next_pending_probe([again] * 8):
        profiles.continue_probe(first)
    assert profiles.costs[first].row_counts == {1, 2, 3, 4, 6, 8, 12, 16}
    assert sum(reference() is not None for reference in references) <= 7


@torch.inference_mode()
def test_shapes_of_a_request_in_preparation_are_not_evicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model's shape is probed; while the refiner's is probed, other shapes fill the limit."""
    monkeypatch.setattr(ShapeProfiles, "_MAX_SHAPES", 2)
    base = save_sdxl(tmp_path / "base")
    family: Any = loading.load(base, make_settings(refiner=str(save_refiner(tmp_path / "refiner", base))))
    engine = InlineEngine(family)
    refined = make_request(enable_refiner=True, num_inference_steps=5)
    others = [make_request(width=width, num_inference_steps=1) for width in (72, 80, 88, 96, 104, 112)]
    # Round-robin: the probes of these are done while the refiner's probe is only half done.
    engine.probe_shapes(*others)
    engine.run(refined, *others)
    assert not engine.errors
    assert len(engine.images) == 7
