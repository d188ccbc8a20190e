"""Same seed, same bytes: the promise, shown by drawing, and what the probe and the rule do for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hypergen.denoising.denoising_state import DenoisingState
from hypergen.denoising.schedulers import SAMPLERS
from hypergen.engine.batch_invariance.probe import BatchInvariance, Probe
from hypergen.errors import RequestError
from hypergen.events import Event, Progress
from hypergen.models import loading
from hypergen.models.cfg import random_rows
from hypergen.models.family import Family
from hypergen.request import GenerationRequest
from tests.support.sync_engine import InlineEngine, make_request, make_settings, prepare_image

MakeEngine = Callable[..., InlineEngine]

_PROMPTS = ["a cat", "a red dog on a green hill", "", "three birds"]


def test_a_seeded_image_has_the_same_bytes_alone_and_among_others(inline: MakeEngine) -> None:
    chance = random.Random(1)
    tested = [_random_request(chance, sampler) for sampler in [*SAMPLERS, *SAMPLERS, None, None]]
    assert len(tested) >= 30
    assert len({request.sampler for request in tested}) >= 10

    alone = inline(prompt_cache_mb=0)
    _draw_one_after_another(alone, tested)
    assert max(alone.images[request.id][0].shared_forwards for request in tested) == 0
    crowded = inline(prompt_cache_mb=0, aging=0)
    _draw_among_neighbours(crowded, tested, chance)

    assert [request.id for request in tested if crowded.data(request) != alone.data(request)] == []
    assert min(crowded.images[request.id][0].shared_forwards for request in tested) > 0
    status = crowded.engine.status()
    assert status.determinism == {"64x64": "exact"}
    assert status.image_steps / status.forwards >= 2


def test_without_the_rule_neighbours_change_the_bytes(sd_folder: Path) -> None:
    """The test above can fail: where the probe finds something to replace, leaving it changes pictures."""
    family = loading.load(sd_folder, make_settings())

    def make(**settings: object) -> InlineEngine:
        return InlineEngine(family, determinism="fast", **settings)

    chance = random.Random(2)
    tested = [_random_request(chance, sampler) for sampler in [*SAMPLERS, *SAMPLERS]]
    crowded = make(aging=0)
    _draw_among_neighbours(crowded, tested, chance)
    if crowded.engine.status().determinism == {"64x64": "exact"}:
        pytest.skip("on this machine rows do not depend on their neighbours even without the rule")
    alone = make()
    _draw_one_after_another(alone, tested)
    assert [r.id for r in tested if crowded.final_latents[r.id] != alone.final_latents[r.id]]
    # Rounding to 8 bits hides it in most pictures, but not in all.
    assert [r.id for r in tested if crowded.data(r) != alone.data(r)]


def _random_request(chance: random.Random, sampler: str | None) -> GenerationRequest:
    return make_request(
        prompt=chance.choice(_PROMPTS),
        negative_prompt=chance.choice([None, "blurred"]),
        num_inference_steps=chance.randint(3, 9),
        guidance_scale=chance.choice([1.0, 3.0, 7.5]),
        seed=chance.randrange(2**32),
        sampler=sampler,
    )


def _draw_one_after_another(engine: InlineEngine, requests: list[GenerationRequest]) -> None:
    coming = iter(requests[1:])

    def bring_the_next(_id: str, event: Event | RequestError) -> None:
        if isinstance(event, Progress) and event.step == event.steps and (request := next(coming, None)):
            engine.submit(request)

    engine.run(requests[0], on_event=bring_the_next)


def _draw_among_neighbours(
    engine: InlineEngine, tested: list[GenerationRequest], chance: random.Random
) -> None:
    """Each step may bring another of the tested requests or a neighbour; a few are always there."""
    neighbours = [_random_request(chance, chance.choice([None, *SAMPLERS])) for _ in tested]
    coming = [*tested, *neighbours]
    chance.shuffle(coming)
    coming += [_random_request(chance, None) for _ in range(8)]  # so that no tested one is left alone

    def bring_more(_id: str, event: Event | RequestError) -> None:
        if not isinstance(event, Progress):  # finished files are reported from other threads
            return
        last_step = event.step == event.steps
        if coming and (last_step or chance.random() < 0.05):
            engine.submit(coming.pop(0))

    first = [coming.pop(0) for _ in range(6)]
    engine.run(*first, on_event=bring_more)


def _like(family: Family, width: int, height: int) -> DenoisingState:
    return prepare_image(family, make_request(width=width, height=height))


def _run(probe: Probe) -> Probe:
    for _ in probe.passes:
        pass
    return probe


@torch.inference_mode()
def test_the_rule_repairs_what_the_probe_finds(sd_folder: Path) -> None:
    family = loading.load(sd_folder, make_settings())
    before = _run(BatchInvariance(family, enabled=False, max_rows=8).probe(_like(family, 64, 64)))
    after = _run(BatchInvariance(family, enabled=True, max_rows=8).probe(_like(family, 64, 64)))
    assert after.verdict == "exact"
    assert after.differing.isdisjoint(after.seconds)
    assert bool(before.differing) == (before.verdict == "close")
    assert {1, 2} <= after.seconds.keys() <= {1, 2, 3, 4, 6, 8}
    if before.verdict == "exact":
        pytest.skip("on this machine there is nothing to replace")


@torch.inference_mode()
def test_probing_other_sizes_later_does_not_change_an_image(family: Family) -> None:
    rule = BatchInvariance(family, enabled=True, max_rows=4)
    generator = torch.Generator("cpu").manual_seed(0)
    _run(rule.probe(_like(family, 64, 64)))
    rows = random_rows(_like(family, 64, 64), 1, generator)
    before = family.forward(*rows)
    for width, height in ((120, 88), (72, 200), (256, 64)):
        _run(rule.probe(_like(family, width, height)))
    assert torch.equal(before, family.forward(*rows))


@torch.inference_mode()
def test_a_slow_probe_stops_early_but_never_before_a_guided_image(family: Family) -> None:
    probe = _run(BatchInvariance(family, enabled=True, max_rows=16, budget_s=0).probe(_like(family, 64, 64)))
    assert probe.seconds.keys() == {1, 2}
