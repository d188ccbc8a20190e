"""Which images take the next step together, decided over real states and known costs."""

from __future__ import annotations

from typing import Any

from hypergen.denoising.denoising_state import DenoisingState
from hypergen.engine.scheduler import CostCurve, batch_key, next_batch
from hypergen.models.family import Family
from tests.support.sync_engine import make_request, prepare_image

_LINEAR = {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}  # more rows gain nothing
_FLAT = {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}  # more rows are free


def _start(family: Family, waited_s: float = 0, **changes: Any) -> DenoisingState:
    state = prepare_image(family, make_request(**changes))
    state.queued_at = -waited_s
    return state


def _choose(
    images: list[DenoisingState], seconds: dict[int, float], aging: float = 0.2, most: int = 8, **curve: Any
) -> list[DenoisingState]:
    costs = {batch_key(image).shared: CostCurve(8, seconds=dict(seconds), **curve) for image in images}
    return next_batch(images, costs, most, aging, now=0)


def test_nothing_is_chosen_from_nothing() -> None:
    assert next_batch([], {}, 8, 0.2, 0) == []


def test_rows_are_filled_up_to_the_knee(family: Family) -> None:
    images = [_start(family) for _ in range(6)]
    assert len(_choose(images, _FLAT)) == 4
    assert len(_choose(images, {1: 1.0, 2: 1.0, 4: 1.2, 8: 1.4})) == 4
    assert len(_choose(images, _LINEAR)) == 1
    assert len(_choose(images, {1: 1.0, 2: 1.0, 4: 1.2, 8: 1.4}, most=3)) == 3


def test_only_sizes_of_a_pass_that_were_proved_are_used(family: Family) -> None:
    images = [_start(family, guidance_scale=1.0) for _ in range(7)]
    seconds = {1: 1.0, 2: 1.0, 4: 1.2, 8: 1.4}
    assert len(_choose(images, seconds, row_counts=frozenset(seconds))) == 4
    assert len(_choose(images, seconds)) == 7


def test_guided_and_unguided_images_of_any_sampler_and_length_share(family: Family) -> None:
    images = [
        _start(family, guidance_scale=1.0, sampler="ddim"),
        _start(family, num_inference_steps=50, sampler="heun"),
        _start(family, negative_prompt="blurred", seed=3),
    ]
    assert len(_choose(images, {1: 1.0, 2: 1.0, 4: 1.2, 8: 1.4})) == 3


def test_other_sizes_and_longer_prompts_do_not_share(family: Family) -> None:
    first = _start(family, num_inference_steps=1)
    others = [_start(family, width=72), _start(family, prompt="long " * 100)]
    assert _choose([first, *others], {1: 1.0, 2: 1.0, 4: 1.2, 8: 1.4}) == [first]


def test_an_image_that_must_run_alone_runs_alone(family: Family) -> None:
    lone, other = _start(family, num_inference_steps=1), _start(family)
    lone.must_run_alone = True
    assert _choose([lone, other], {1: 1.0, 2: 1.0, 4: 1.2, 8: 1.4}) == [lone]
    assert batch_key(lone) != batch_key(other)
    assert batch_key(lone).shared == batch_key(other).shared


def test_less_remaining_work_goes_first_until_waiting_outweighs_it(family: Family) -> None:
    long, short = _start(family, num_inference_steps=20), _start(family, num_inference_steps=3)
    assert _choose([long, short], _LINEAR) == [short]
    long.queued_at = -1000
    assert _choose([long, short], _LINEAR) == [long]
    assert _choose([long, short], _LINEAR, aging=0) == [short]


def test_the_curve_follows_what_passes_take() -> None:
    curve = CostCurve(8, seconds={2: 1.0, 4: 10.0})
    assert curve.efficient_rows() == 2
    for _ in range(6):
        curve.record(4, 1.0)  # the machine was busy when it was probed
    assert curve.efficient_rows() == 4
    curve.record(4, 1000.0)  # and once it was interrupted
    assert curve.seconds[4] < 1.6
    curve.max_rows = 2  # out of memory
    assert curve.efficient_rows() == 2
