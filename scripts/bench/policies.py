"""The policies: sequential diffusers calls, static batching, and the engine's step-level batching."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from hypergen.config import EngineSettings
from hypergen.engine.engine import Engine
from hypergen.errors import RequestError
from hypergen.events import Event, ImageFinished
from hypergen.images import encoding
from hypergen.models.family import Family
from hypergen.request import GenerationRequest
from scripts.bench.clock import Clock
from scripts.bench.jobs import Job


@dataclass(frozen=True)
class FinishedJob:
    """A job with the times of its arrival and its finished file, in seconds of the run's clock."""

    job: Job
    queued_at: float
    finished_at: float

    @property
    def latency_s(self) -> float:
        return self.finished_at - self.queued_at


class Policy(Protocol):
    """Runs jobs on one thread, from prompts to PNG files.

    Attributes:
        mean_batch_size: images per batch of the latest run.
    """

    mean_batch_size: float

    def run(self, jobs: Sequence[Job], interval_s: float) -> list[FinishedJob]:
        """Run all jobs with a mean interval of `interval_s` seconds between arrivals."""
        ...


class Arrivals:
    """The jobs of a list in order of arrival, with times relative to now."""

    def __init__(self, jobs: Sequence[Job], interval_s: float, clock: Clock) -> None:
        started_at = clock()
        self._pending = deque((started_at + job.arrival * interval_s, job) for job in jobs)
        self._clock = clock

    def __bool__(self) -> bool:
        return bool(self._pending)

    def pop_arrived(self) -> list[tuple[float, Job]]:
        """Remove the jobs that have arrived by now; returns them with their arrival times."""
        now = self._clock()
        arrived: list[tuple[float, Job]] = []
        while self._pending and self._pending[0][0] <= now:
            arrived.append(self._pending.popleft())
        return arrived

    def skip_to_next(self) -> None:
        self._clock.skip_to(self._pending[0][0])


@dataclass
class StaticBatching:
    """Diffusers calls, each with a batch of jobs with equal steps and guidance scale.

    The jobs that have waited longest come first, as in an adaptive batcher. With `max_batch_size` 1 the calls
    are sequential.
    """

    pipeline: Any
    side: int  # height and width of the images, in pixels
    max_batch_size: int
    clock: Clock
    mean_batch_size: float = 1

    def run(self, jobs: Sequence[Job], interval_s: float) -> list[FinishedJob]:
        arrivals = Arrivals(jobs, interval_s, self.clock)
        waiting: list[tuple[float, Job]] = []
        finished: list[FinishedJob] = []
        forwards = 0
        while arrivals or waiting:
            waiting += arrivals.pop_arrived()
            if not waiting:
                arrivals.skip_to_next()
                continue
            equal = [entry for entry in waiting if _settings(entry[1]) == _settings(waiting[0][1])]
            batch = equal[: self.max_batch_size]
            waiting = [entry for entry in waiting if entry not in batch]
            self.generate([job for _, job in batch])
            forwards += batch[0][1].num_inference_steps
            finished += [FinishedJob(job, queued_at, self.clock()) for queued_at, job in batch]
        self.mean_batch_size = sum(job.num_inference_steps for job in jobs) / forwards
        return finished

    def generate(self, jobs: Sequence[Job]) -> list[bytes]:
        """PNG files of jobs with equal steps and guidance scale, generated in one call."""
        images = self.pipeline(
            prompt=[job.prompt for job in jobs],
            num_inference_steps=jobs[0].num_inference_steps,
            guidance_scale=jobs[0].guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(job.number) for job in jobs],
            height=self.side,
            width=self.side,
        ).images
        return [
            encoding.encode_image(np.asarray(image), request_for(job, self.side), 0, "benchmark")
            for image, job in zip(images, jobs, strict=True)
        ]


def sequential_at_interval(calls: Sequence[FinishedJob], interval_s: float) -> list[FinishedJob]:
    """The times of sequential calls, measured back to back, at another arrival rate.

    The duration of a call does not depend on the load; its start follows from the end of the previous call.
    """
    finished: list[FinishedJob] = []
    previous, free_at = calls[0].queued_at, 0.0
    for call in calls:
        queued_at = call.job.arrival * interval_s
        free_at = max(free_at, queued_at) + call.finished_at - previous
        previous = call.finished_at
        finished.append(FinishedJob(call.job, queued_at, free_at))
    return finished


def _settings(job: Job) -> tuple[int, float]:
    return job.num_inference_steps, job.guidance_scale


class StepLevelBatching:
    """The engine, on the thread and clock of the benchmark.

    Attributes:
        files: PNG files of the latest run, by job number.
    """

    def __init__(self, family: Family, side: int, settings: EngineSettings, clock: Clock) -> None:
        self.side = side
        self.clock = clock
        self.files: dict[int, bytes] = {}
        self.mean_batch_size = 1.0
        self._finished_at: dict[int, float] = {}
        self.engine = Engine(
            family, "benchmark", settings, self._report, clock=clock, encoders=_InlineExecutor()
        )
        self.engine.warm_up()
        with torch.inference_mode():
            self.engine.shape_profiles.finish_probes()

    def run(self, jobs: Sequence[Job], interval_s: float) -> list[FinishedJob]:
        self.files.clear()
        self._finished_at.clear()
        arrivals = Arrivals(jobs, interval_s, self.clock)
        queued_at: dict[int, float] = {}
        before = self.engine.status()
        while len(self.files) < len(jobs):
            for arrived_at, job in arrivals.pop_arrived():
                queued_at[job.number] = arrived_at
                self.engine.add_request(request_for(job, self.side))
            if len(self.files) == len(queued_at):
                arrivals.skip_to_next()
                continue
            self.engine.step()
        after = self.engine.status()
        self.mean_batch_size = (after.image_steps - before.image_steps) / (after.forwards - before.forwards)
        return [FinishedJob(job, queued_at[job.number], self._finished_at[job.number]) for job in jobs]

    def _report(self, request_id: str, event: Event | RequestError) -> None:
        if isinstance(event, RequestError):
            raise event
        if isinstance(event, ImageFinished):
            self.files[int(request_id)] = event.data
            self._finished_at[int(request_id)] = self.clock()


def request_for(job: Job, side: int) -> GenerationRequest:
    return GenerationRequest(
        id=str(job.number),
        prompt=job.prompt,
        negative_prompt=None,
        width=side,
        height=side,
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        seed=job.number,
        seed_given=True,
    )


class _InlineExecutor(Executor):
    """Encodes in the calling thread, like the other policies, so that the thread's clock measures it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future
