"""Measures the policies on the same job lists, interleaved, so that other load affects all of them."""

from __future__ import annotations

import copy
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
from scripts.bench.policies import Policy, StaticBatching, StepLevelBatching, sequential_at_interval
from scripts.bench.published import RANDOM_WEIGHTS, refuse_on_cpu
from scripts.bench.work import family_of

POLICIES = ("sequential", "static", "step", "step-fast")
GUIDANCE = {"mixed": GUIDANCE_SCALES, "one": ONE_GUIDANCE_SCALE}
EMBEDDED = "embedded"
MODELS = ("small", "medium", EMBEDDED)


class Comparison:
    """The policies for one model, each created at its first use.

    Args:
        side: height and width of the images, in pixels.
        family: makes a copy of the model for an engine with these settings, because engines change layers.
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
    def sequential(self) -> StaticBatching:
        return StaticBatching(self._pipeline, self.side, 1, self.clock)

    @cached_property
    def static(self) -> StaticBatching:
        return StaticBatching(self._pipeline, self.side, self._settings.max_batch_size, self.clock)

    @cached_property
    def step(self) -> StepLevelBatching:
        return self._engine(self._settings)

    @cached_property
    def step_fast(self) -> StepLevelBatching:
        return self._engine(self._settings.model_copy(update={"determinism": "fast"}))

    def policy(self, name: str) -> Policy:
        """One of `POLICIES`."""
        return getattr(self, name.replace("-", "_"))

    def _engine(self, settings: EngineSettings) -> StepLevelBatching:
        # Without a prompt cache: prompts repeat between runs, and diffusers encodes them each time.
        settings = settings.model_copy(update={"prompt_cache_mb": 0})
        return StepLevelBatching(self._family(settings), self.side, settings, self.clock)

    def mean_service_s(self) -> float:
        """The mean time of a job in diffusers, the inverse of the capacity."""
        seconds: list[float] = []
        for number, steps in enumerate((STEPS[0], *STEPS)):
            started = self.clock()
            self.sequential.generate([Job(number, 0, steps, GUIDANCE_SCALES[0])])
            seconds.append(self.clock() - started)
        return statistics.mean(seconds[1:])  # the first call of a process is slower


def load_comparison(model: str, settings: EngineSettings) -> Comparison:
    """Load a model for a comparison of the policies.

    Raises:
        ConfigurationError: the model is too large for a CPU.
    """
    refuse_on_cpu(model)
    if model == EMBEDDED:
        folder = Path(hypergen.__file__).parent / "embedded"
        pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        side = pipeline.unet.config.sample_size * 8

        def family(settings: EngineSettings) -> Family:
            return loading.load(folder, settings)
    else:
        pipeline, side = RANDOM_WEIGHTS[model].pipeline(), RANDOM_WEIGHTS[model].side

        def family(settings: EngineSettings) -> Family:
            return family_of(_copy_pipeline(pipeline), side, settings)

    pipeline.set_progress_bar_config(disable=True)
    return Comparison(model, side, pipeline, family, settings)


def _copy_pipeline(pipeline: Any) -> Any:
    """A copy with shared text encoders; engines change the other networks."""
    encoders = [module for name, module in pipeline.components.items() if name.startswith("text_encoder")]
    return copy.deepcopy(pipeline, {id(encoder): encoder for encoder in encoders})


def measure(
    comparison: Comparison,
    policies: Sequence[str],
    loads: Sequence[float],
    seeds: int,
    jobs: int,
    guidance: str,
) -> Iterator[Run]:
    """Run each job list with each policy at each load; the order of the policies rotates with the seed.

    Sequential calls take the same time at any load, so they are measured once per seed; their waiting time is
    computed.

    Args:
        loads: arrival rates in units of the capacity of `sequential`.
    """
    for name in policies:
        comparison.policy(name)  # load and warm up before the measurement
    service_s = comparison.mean_service_s()
    for seed in range(seeds):
        trace = job_list(jobs, seed, GUIDANCE[guidance])
        first = seed % len(policies)
        for name in [*policies[first:], *policies[:first]]:
            policy = comparison.policy(name)
            calls = policy.run(trace, 0) if name == "sequential" else []
            for load in loads:
                interval_s = service_s / load
                finished = (
                    sequential_at_interval(calls, interval_s) if calls else policy.run(trace, interval_s)
                )
                yield Run(
                    comparison.name,
                    guidance,
                    load,
                    seed,
                    name,
                    figures_of(finished),
                    policy.mean_batch_size,
                )
