"""Shapes: when larger passes are probed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hypergen.engine.batching import group_key
from hypergen.engine.shapes import Shapes
from hypergen.models import loading
from tests.engine.inline import make_request, make_settings


@pytest.fixture
def family(sd_folder: Path) -> Any:
    return loading.load(sd_folder, make_settings())


def _shapes(family: Any, seconds: float) -> Shapes:
    """With a clock by which every forward pass takes so long."""
    ticks: Iterator[float] = (tick * seconds for tick in itertools.count())
    return Shapes(family, make_settings(), lambda: next(ticks))


@torch.inference_mode()
@pytest.mark.parametrize(("seconds", "worth"), [(0.01, True), (1.0, False)])
def test_an_idle_engine_probes_only_passes_that_are_short(family: Any, seconds: float, worth: bool) -> None:
    shapes = _shapes(family, seconds)
    one, another = (family.start(make_request(), index) for index in range(2))
    list(shapes.learn(one))
    assert (shapes.unfinished(()) is not None) == worth
    assert shapes.unfinished([one]) is None  # one guided image: two rows, which are proved
    assert shapes.unfinished([one, another]) is not None


@torch.inference_mode()
def test_a_probe_can_be_finished_however_long_it_takes(family: Any) -> None:
    shapes = _shapes(family, 1.0)
    one = family.start(make_request(), 0)
    list(shapes.learn(one))
    assert shapes.costs[group_key(one)].row_counts == {1, 2}
    shapes.finish()
    assert {1, 2, 4, 8} <= (shapes.costs[group_key(one)].row_counts or set())
    assert shapes.unfinished([one] * 20) is None


@torch.inference_mode()
def test_a_probe_makes_one_forward_pass_at_a_time(family: Any) -> None:
    shapes = _shapes(family, 0.01)
    list(shapes.learn(family.start(make_request(), 0)))
    passes: list[int] = []
    family.unet.register_forward_hook(lambda _module, inputs, _output: passes.append(len(inputs[0])))
    while key := shapes.unfinished(()):
        before = len(passes)
        shapes.probe_on(key)
        assert len(passes) <= before + 1
    assert sorted(set(passes)) == [3, 4, 6, 8, 12, 16]
    assert passes == sorted(passes)
