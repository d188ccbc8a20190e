"""The scheduler with real states and given cost curves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from hypergen.denoising.denoising_state import DenoisingState
from hypergen.engine.scheduler import CostCurve, RunningImages, batch_key
from hypergen.models.family import Family
from hypergen.request import ApiKey
from tests.support.sync_engine import make_request, prepare_image

_LINEAR = {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}  # more rows are not more efficient
_FLAT = {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}  # more rows are free


def _state(family: Family, waited_s: float = 0, **changes: Any) -> DenoisingState:
    state = prepare_image(family, make_request(**changes))
    state.queued_at = -waited_s
    return state


def _batch(
    images: list[DenoisingState],
    seconds: dict[int, float],
    aging: float = 0.2,
    max_batch_size: int = 8,
    **curve: Any,
) -> list[DenoisingState]:
    costs = {batch_key(image).shared: CostCurve(8, seconds=dict(seconds), **curve) for image in images}
    return RunningImages(images).next_batch(costs, max_batch_size, aging, now=0)


def test_without_images_the_batch_is_empty() -> None:
    assert RunningImages().next_batch({}, 8, 0.2, 0) == []


def test_a_batch_is_filled_up_to_the_efficient_rows(family: Family) -> None:
    images = [_state(family) for _ in range(6)]
    assert len(_batch(images, _FLAT)) == 4
    assert len(_batch(images, {1: 1.0, 2: 1.0, 4: 1.2, 8: 1.4})) == 4
    assert len(_batch(images, _LINEAR)) == 1
    assert len(_batch(images, {1: 1.0, 2: 1.0, 4: 1.2, 8: 1.4}, max_batch_size=3)) == 3


def test_batches_are_padded_to_bit_exact_row_counts() -> None:
    curve = CostCurve(8, frozenset({2, 4, 8}))
    assert [curve.padded(rows) for rows in range(1, 9)] == [2, 2, 4, 4, 8, 8, 8, 8]
    assert CostCurve(8).padded(7) == 7
    assert CostCurve(1, frozenset({1})).padded(2) == 2  # an image with guidance where rows run alone


def test_images_with_and_without_guidance_of_any_sampler_share_a_batch(family: Family) -> None:
    images = [
        _state(family, guidance_scale=1.0, sampler="ddim"),
        _state(family, num_inference_steps=50, sampler="heun"),
        _state(family, negative_prompt="blurred", seed=3),
    ]
    assert len(_batch(images, {1: 1.0, 2: 1.0, 4: 1.2, 8: 1.4})) == 3


def test_other_sizes_and_longer_prompts_do_not_share_a_batch(family: Family) -> None:
    first = _state(family, num_inference_steps=1)
    others = [_state(family, width=72), _state(family, prompt="long " * 100)]
    assert _batch([first, *others], {1: 1.0, 2: 1.0, 4: 1.2, 8: 1.4}) == [first]


def test_an_image_that_must_run_alone_runs_alone(family: Family) -> None:
    alone, other = _state(family, num_inference_steps=1), _state(family)
    alone.must_run_alone = True
    assert _batch([alone, other], {1: 1.0, 2: 1.0, 4: 1.2, 8: 1.4}) == [alone]
    assert batch_key(alone) != batch_key(other)
    assert batch_key(alone).shared == batch_key(other).shared


def test_a_batch_has_lora_products_of_at_most_two_sizes(family: Family) -> None:
    sizes: list[set[int]] = [{1}, {4}, {16}, set(), {1, 4}, {1}]
    images = [_state(family, seed=i, num_inference_steps=1) for i in range(len(sizes))]
    for image, own in zip(images, sizes, strict=True):
        image.lora_sizes = frozenset(own)
        image.loras = ((object(), 1.0),) if own else ()
    assert _batch(images, _FLAT) == [images[i] for i in (0, 1, 3, 4)]
    assert _batch(images[2:], _FLAT) == [images[2], images[3], images[5]]


def test_images_with_the_same_loras_share_a_batch_whatever_their_ranks(family: Family) -> None:
    lora = object()
    images = [_state(family, seed=i) for i in range(4)]
    for image, weight in zip(images[:3], (1.0, 0.5, 0.2), strict=True):
        image.lora_sizes = frozenset({1, 4, 16})
        image.loras = ((lora, weight),)
    assert _batch(images, _FLAT) == images
    images[1].loras = ((object(), 1.0),)
    assert _batch(images, _FLAT) == [images[0], images[2], images[3]]


def test_less_remaining_work_goes_first_unless_aging_outweighs_it(family: Family) -> None:
    long, short = _state(family, num_inference_steps=20), _state(family, num_inference_steps=3)
    assert _batch([long, short], _LINEAR) == [short]
    long.queued_at = -1000
    assert _batch([long, short], _LINEAR) == [long]
    assert _batch([long, short], _LINEAR, aging=0) == [short]


def test_the_cost_curve_follows_measured_forward_passes() -> None:
    curve = CostCurve(8, seconds={2: 1.0, 4: 10.0})
    assert curve.efficient_rows() == 2
    for _ in range(6):
        curve.record(4, 1.0)  # the machine was busy during the probe
    assert curve.efficient_rows() == 4
    curve.record(4, 1000.0)  # one outlier
    assert curve.seconds[4] < 1.6
    curve.max_rows = 2  # out of memory
    assert curve.efficient_rows() == 2


def _served(images: RunningImages, keys: list[ApiKey], rounds: int) -> Counter[str]:
    """Rows per API key after some batches of endless images."""
    costs = {batch_key(image).shared: CostCurve(8, seconds=dict(_FLAT)) for image in images}
    served: Counter[str] = Counter()
    for _ in range(rounds):
        for image in images.next_batch(costs, 8, 0.2, now=0):
            served[image.request.api_key.name] += image.rows
    assert set(served) == {key.name for key in keys}
    return served


def test_keys_share_the_engine_by_their_weights(family: Family) -> None:
    busy, other, high = ApiKey("busy"), ApiKey("other"), ApiKey("high", "high")
    for keys, weights in (([busy, other], (1, 1)), ([busy, other, high], (1, 1, 4))):
        images = RunningImages(_state(family, api_key=key) for key in keys for _ in range(20))
        served = _served(images, keys, 120)
        total, shares = served.total(), sum(weights)
        for key, weight in zip(keys, weights, strict=True):
            assert served[key.name] == pytest.approx(total * weight / shares, rel=0.05)


def test_one_image_of_a_key_is_in_the_second_batch_at_the_latest(family: Family) -> None:
    busy, other = ApiKey("busy"), ApiKey("other")
    images = RunningImages(_state(family, waited_s=100, api_key=busy) for _ in range(500))
    _served(images, [busy], 50)
    lone = _state(family, num_inference_steps=50, api_key=other)
    images.add(lone)
    costs = {batch_key(image).shared: CostCurve(8, seconds=dict(_FLAT)) for image in images}
    batches = [images.next_batch(costs, 8, 0.2, now=0) for _ in range(10)]
    assert all(lone in batch for batch in batches[1:])  # the first is a tie, which the shorter images win
    assert all(len(batch) == 4 for batch in batches)  # the rest of each batch is filled


def test_a_key_gains_nothing_by_waiting(family: Family) -> None:
    busy, other = ApiKey("busy"), ApiKey("other")
    images = RunningImages(_state(family, api_key=busy) for _ in range(20))
    _served(images, [busy], 100)
    for _ in range(20):
        images.add(_state(family, api_key=other))
    served = _served(images, [busy, other], 10)
    assert served["busy"] == served["other"]
