"""ShapeProfiles: when larger passes are probed."""

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


def _shapes(family: Any, seconds: float) -> ShapeProfiles:
    """With a clock by which every forward pass takes so long."""
    ticks: Iterator[float] = (tick * seconds for tick in itertools.count())
    return ShapeProfiles(family, make_settings(), lambda: next(ticks))


@torch.inference_mode()
@pytest.mark.parametrize(("seconds", "worth"), [(0.01, True), (1.0, False)])
def test_an_idle_engine_probes_only_passes_that_are_short(family: Any, seconds: float, worth: bool) -> None:
    shapes = _shapes(family, seconds)
    one, another = (prepare_image(family, make_request(), index) for index in range(2))
    list(shapes.probe_minimum(one))
    assert (shapes.next_pending_probe(()) is not None) == worth
    assert shapes.next_pending_probe([one]) is None  # one guided image: two rows, which are proved
    assert shapes.next_pending_probe([one, another]) is not None


@torch.inference_mode()
def test_a_probe_can_be_finished_however_long_it_takes(family: Any) -> None:
    shapes = _shapes(family, 1.0)
    one = prepare_image(family, make_request())
    list(shapes.probe_minimum(one))
    assert shapes.costs[batch_key(one)].row_counts == {1, 2}
    shapes.finish()
    assert {1, 2, 4, 8} <= (shapes.costs[batch_key(one)].row_counts or set())
    assert shapes.next_pending_probe([one] * 20) is None


@torch.inference_mode()
def test_a_probe_makes_one_forward_pass_at_a_time(family: Any) -> None:
    shapes = _shapes(family, 0.01)
    list(shapes.probe_minimum(prepare_image(family, make_request())))
    passes: list[int] = []
    family.denoiser.register_forward_hook(lambda _module, inputs, _output: passes.append(len(inputs[0])))
    while key := shapes.next_pending_probe(()):
        before = len(passes)
        shapes.probe_next(key)
        assert len(passes) <= before + 1
    assert sorted(set(passes)) == [3, 4, 6, 8, 12, 16]
    assert passes == sorted(passes)


@torch.inference_mode()
def test_at_most_eight_unfinished_probes_keep_tensors_and_the_others_go_on_when_needed(family: Any) -> None:
    shapes = _shapes(family, 1.0)  # no pass is short enough for an idle engine
    requests = [make_request(width=width) for width in range(64, 64 + 8 * 10, 8)]
    images = [prepare_image(family, request) for request in requests]
    first = batch_key(images[0])
    kept = [weakref.ref(image) for image in images]
    while images:
        list(shapes.probe_minimum(images.pop(0)))
    gc.collect()
    assert [reference() is not None for reference in kept] == [False] * 2 + [True] * 8

    again = prepare_image(family, requests[0])
    list(shapes.probe_minimum(again))
    assert shapes.costs[first].row_counts == {1, 2}
    while shapes.next_pending_probe([again] * 8):
        shapes.probe_next(first)
    assert shapes.costs[first].row_counts == {1, 2, 3, 4, 6, 8, 12, 16}
    assert sum(reference() is not None for reference in kept) <= 7


@torch.inference_mode()
def test_what_a_joining_request_has_learned_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two stages the first is known while the second is probed; 256 other shapes may come meanwhile."""
    monkeypatch.setattr(ShapeProfiles, "_KEPT", 2)
    base = save_sdxl(tmp_path / "base")
    family: Any = loading.load(base, make_settings(refiner=str(save_refiner(tmp_path / "refiner", base))))
    engine = InlineEngine(family)
    refined = make_request(enable_refiner=True, num_inference_steps=5)
    others = [make_request(width=width, num_inference_steps=1) for width in (72, 80, 88, 96, 104, 112)]
    # One pass of a probe each in turn: these are through when the second stage of the first is half done.
    engine.probe_shapes(*others)
    engine.run(refined, *others)
    assert not engine.errors
    assert len(engine.images) == 7
