"""Three ways of serving one job list: call after call, whole batches of equal settings, step by step."""

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
class Served:
    """A job that was served; both times are seconds of the run's clock."""

    job: Job
    queued_at: float
    finished_at: float

    @property
    def latency_s(self) -> float:
        return self.finished_at - self.queued_at


class Policy(Protocol):
    """Serves jobs on one thread, from prompts to PNG files.

    Attributes:
        images_per_pass: mean number of images that shared a forward pass in the latest run.
    """

    images_per_pass: float

    def serve(self, jobs: Sequence[Job], interval_s: float) -> list[Served]:
        """Serve all jobs, which arrive at a mean distance of `interval_s` seconds."""
        ...


class Arrivals:
    """The jobs of a list in the order of their arrival; the first run of the clock is counted from now."""

    def __init__(self, jobs: Sequence[Job], interval_s: float, clock: Clock) -> None:
        started_at = clock()
        self._due = deque((started_at + job.waited_for * interval_s, job) for job in jobs)
        self._clock = clock

    def __bool__(self) -> bool:
        return bool(self._due)

    def take(self) -> list[tuple[float, Job]]:
        """Those that have arrived by now, with their moments."""
        now = self._clock()
        arrived: list[tuple[float, Job]] = []
        while self._due and self._due[0][0] <= now:
            arrived.append(self._due.popleft())
        return arrived

    def skip_to_next(self) -> None:
        self._clock.skip_to(self._due[0][0])


@dataclass
class WholeBatches:
    """Stock diffusers calls.

    With `max_batch_size` 1 one call after another; else whole batches of jobs with equal steps and guidance,
    those that have waited longest first, as an adaptive batcher puts them together.
    """

    pipeline: Any
    side: int  # of a picture, in pixels
    max_batch_size: int
    clock: Clock
    images_per_pass: float = 1

    def serve(self, jobs: Sequence[Job], interval_s: float) -> list[Served]:
        arrivals = Arrivals(jobs, interval_s, self.clock)
        waiting: list[tuple[float, Job]] = []
        served: list[Served] = []
        passes = 0
        while arrivals or waiting:
            waiting += arrivals.take()
            if not waiting:
                arrivals.skip_to_next()
                continue
            equal = [entry for entry in waiting if _settings(entry[1]) == _settings(waiting[0][1])]
            batch = equal[: self.max_batch_size]
            waiting = [entry for entry in waiting if entry not in batch]
            self.draw([job for _, job in batch])
            passes += batch[0][1].num_inference_steps
            served += [Served(job, queued_at, self.clock()) for queued_at, job in batch]
        self.images_per_pass = sum(job.num_inference_steps for job in jobs) / passes
        return served

    def draw(self, jobs: Sequence[Job]) -> list[bytes]:
        """Draw jobs of equal settings in one call."""
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


def one_after_another(calls: Sequence[Served], interval_s: float) -> list[Served]:
    """What calls that were measured back to back would have been at another rate of arrivals.

    A call takes as long at one load as at another; when it starts follows from the one before it.
    """
    served: list[Served] = []
    previous, free_at = calls[0].queued_at, 0.0
    for call in calls:
        queued_at = call.job.waited_for * interval_s
        free_at = max(free_at, queued_at) + call.finished_at - previous
        previous = call.finished_at
        served.append(Served(call.job, queued_at, free_at))
    return served


def _settings(job: Job) -> tuple[int, float]:
    return job.num_inference_steps, job.guidance_scale


class StepByStep:
    """The engine as it serves, on the thread and clock of the benchmark.

    Attributes:
        files: the pictures of the latest run, by job number.
    """

    def __init__(self, family: Family, side: int, settings: EngineSettings, clock: Clock) -> None:
        self.side = side
        self.clock = clock
        self.files: dict[int, bytes] = {}
        self.images_per_pass = 1.0
        self._finished_at: dict[int, float] = {}
        self.engine = Engine(family, "benchmark", settings, self._report, clock=clock, encoders=_SameThread())
        self.engine.warm_up()
        with torch.inference_mode():
            self.engine.shapes.finish()

    def serve(self, jobs: Sequence[Job], interval_s: float) -> list[Served]:
        self.files.clear()
        self._finished_at.clear()
        arrivals = Arrivals(jobs, interval_s, self.clock)
        queued_at: dict[int, float] = {}
        before = self.engine.status()
        while len(self.files) < len(jobs):
            for moment, job in arrivals.take():
                queued_at[job.number] = moment
                self.engine.add_request(request_for(job, self.side))
            if len(self.files) == len(queued_at):
                arrivals.skip_to_next()
                continue
            self.engine.step()
        after = self.engine.status()
        self.images_per_pass = (after.image_steps - before.image_steps) / (after.forwards - before.forwards)
        return [Served(job, queued_at[job.number], self._finished_at[job.number]) for job in jobs]

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


class _SameThread(Executor):
    """Encodes at once, where it is told to: the other policies do so too, and one thread's clock sees it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future
