"""Measure the policies on the same job lists, interleaved, so that what a machine does meanwhile hits all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline

import hypergen
from hypergen.config import EngineSettings
from hypergen.models import loading
from hypergen.models.family import Family
from scripts.bench.clock import Clock
from scripts.bench.figures import Run, figures_of
from scripts.bench.jobs import GUIDANCE_SCALES, ONE_GUIDANCE_SCALE, STEPS, Job, job_list
from scripts.bench.live import own_copy
from scripts.bench.policies import Policy, StepByStep, WholeBatches, one_after_another
from scripts.bench.published import DRAWN, refuse_on_cpu
from scripts.bench.work import family_of

POLICIES = ("sequential", "static", "step", "step-fast")
GUIDANCE = {"mixed": GUIDANCE_SCALES, "one": ONE_GUIDANCE_SCALE}
EMBEDDED = "embedded"
MODELS = ("small", "medium", EMBEDDED)


class Contest:
    """One model, served in every way that is compared, each made when it is first asked for.

    Args:
        side: height and width of the pictures, in pixels.
        family: a new copy of the model for an engine with these settings, because engines change layers.
    """

    def __init__(
        self,
        name: str,
        side: int,
        pipeline: Any,
        family: Callable[[EngineSettings], Family],
        settings: EngineSettings,
    ) -> None:
        self.name = name
        self.side = side
        self.clock = Clock()
        self._pipeline = pipeline
        self._family = family
        self._settings = settings

    @cached_property
    def sequential(self) -> WholeBatches:
        return WholeBatches(self._pipeline, self.side, 1, self.clock)

    @cached_property
    def static(self) -> WholeBatches:
        return WholeBatches(self._pipeline, self.side, self._settings.max_batch_size, self.clock)

    @cached_property
    def step(self) -> StepByStep:
        return self._engine(self._settings)

    @cached_property
    def step_fast(self) -> StepByStep:
        return self._engine(self._settings.model_copy(update={"determinism": "fast"}))

    def policy(self, name: str) -> Policy:
        """One of `POLICIES`."""
        return getattr(self, name.replace("-", "_"))

    def _engine(self, settings: EngineSettings) -> StepByStep:
        # Prompts recur from run to run, and stock diffusers encodes them each time.
        settings = settings.model_copy(update={"prompt_cache_mb": 0})
        return StepByStep(self._family(settings), self.side, settings, self.clock)

    def mean_service_s(self) -> float:
        """What stock diffusers takes for a job of the list, on average: 1 over it is the capacity."""
        seconds: list[float] = []
        for number, steps in enumerate((STEPS[0], *STEPS)):
            started = self.clock()
            self.sequential.draw([Job(number, 0, steps, GUIDANCE_SCALES[0])])
            seconds.append(self.clock() - started)
        return statistics.mean(seconds[1:])  # the first call of a process is slower


def contest(model: str, settings: EngineSettings) -> Contest:
    """Load a model to be served in every way.

    Raises:
        ConfigurationError: it is too large for a CPU.
    """
    refuse_on_cpu(model)
    if model == EMBEDDED:
        folder = Path(hypergen.__file__).parent / "embedded"
        pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        side = pipeline.unet.config.sample_size * 8

        def family(settings: EngineSettings) -> Family:
            return loading.load(folder, settings)
    else:
        pipeline, side = DRAWN[model].pipeline(), DRAWN[model].side

        def family(settings: EngineSettings) -> Family:
            return family_of(own_copy(pipeline), side, settings)

    pipeline.set_progress_bar_config(disable=True)
    return Contest(model, side, pipeline, family, settings)


def measure(
    contest: Contest,
    policies: Sequence[str],
    loads: Sequence[float],
    seeds: int,
    jobs: int,
    guidance: str,
) -> Iterator[Run]:
    """Serve each job list in every way at every load; the order of the policies rotates with the seed.

    Stock calls one after another take as long at one load as at another, so these are made once for a seed;
    waiting follows from when they could start.

    Args:
        loads: arrivals per second over what `sequential` can serve.
    """
    for policy in policies:
        contest.policy(policy)  # loaded and warm before anything is measured
    service_s = contest.mean_service_s()
    for seed in range(seeds):
        trace = job_list(jobs, seed, GUIDANCE[guidance])
        turn = seed % len(policies)
        for policy in [*policies[turn:], *policies[:turn]]:
            chosen = contest.policy(policy)
            calls = chosen.serve(trace, 0) if policy == "sequential" else []
            for load in loads:
                interval_s = service_s / load
                served = one_after_another(calls, interval_s) if calls else chosen.serve(trace, interval_s)
                yield Run(
                    contest.name, guidance, load, seed, policy, figures_of(served), chosen.images_per_pass
                )
