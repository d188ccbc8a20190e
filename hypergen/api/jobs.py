"""Jobs: image requests that are answered later, for work longer than a proxy's patience.

A job lives in this process's memory and is gone with it; its pictures lie with those behind `url` results,
and live as long.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hypergen.api.dialects.endpoint import Endpoint
from hypergen.api.errors import error_body, status_of
from hypergen.api.validation import ValidatedRequest
from hypergen.engine_protocol import ImageGenerator, RequestHandle
from hypergen.errors import (
    DeadlineExceededError,
    GenerationError,
    NotFoundError,
    QueueFullError,
    RequestError,
)
from hypergen.events import ImageFinished, Progress, Started
from hypergen.images.encoding import OUTPUT_FORMATS
from hypergen.images.storage import ImageStorage

logger = logging.getLogger(__name__)

JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]


@dataclass(eq=False)
class Job:
    """One request, its state, and in the end the names of its pictures."""

    id: str
    endpoint: Endpoint
    asked: ValidatedRequest
    created: int
    handle: RequestHandle | None  # None when it has ended: it would hold memory
    state: JobState = "queued"
    step: int = 0
    steps: int | None = None
    started_at: float = 0.0  # monotonic seconds
    ended_at: float | None = None
    error: RequestError | None = None
    images: list[tuple[ImageFinished, str]] = field(default_factory=list[tuple[ImageFinished, str]])
    task: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        return self.ended_at is not None

    def seconds_left(self) -> float | None:
        """How long the rest takes at the pace of the steps so far."""
        if not self.step or self.steps is None:
            return None
        return (time.monotonic() - self.started_at) / self.step * (self.steps - self.step)


class Jobs:
    """The jobs of this server. Belongs to one event loop.

    Args:
        lifetime_s: how long a job can be asked for after its end.
        most: jobs that are kept; the ones that ended first go first.
    """

    def __init__(
        self,
        generator: ImageGenerator,
        storage: ImageStorage,
        lifetime_s: float,
        most: int,
    ) -> None:
        self._generator = generator
        self._storage = storage
        self._lifetime_s = lifetime_s
        self._most = most
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    async def submit(self, endpoint: Endpoint, asked: ValidatedRequest, deadline: float) -> Job:
        """Take a checked request on.

        Args:
            deadline: when it must be finished, by the event loop's clock.

        Raises:
            QueueFullError: there is no room for one more, here or in the queue.
            UnavailableError: the engine is not there.
        """
        self._forget_old()
        if len(self._jobs) >= self._most and not self._forget_one():
            raise QueueFullError(
                f"There are {self._most} unfinished jobs. Try again later.", retry_after_s=60
            )
        handle = await self._generator.submit(asked.generation)
        job = Job(f"job_{uuid.uuid4().hex}", endpoint, asked, int(time.time()), handle)
        self._jobs[job.id] = job
        job.task = asyncio.create_task(self._run(job, handle, deadline))
        return job

    def get(self, job_id: str) -> Job:
        """Raises NotFoundError when the job is unknown or its time is over."""
        self._forget_old()
        job = self._jobs.get(job_id)
        if job is None:
            raise NotFoundError("There is no such job, or its time is over.")
        return job

    async def cancel(self, job_id: str) -> Job:
        """End a job at the next step; one that has ended stays as it is."""
        job = self.get(job_id)
        await self._stop(job)
        return job

    async def close(self) -> None:
        """End all jobs, also those whose time is over."""
        await asyncio.gather(*(self._stop(job) for job in self._jobs.values()), return_exceptions=True)

    async def _stop(self, job: Job) -> None:
        if job.task is not None and not job.task.done():
            job.task.cancel()
            with suppress(asyncio.CancelledError):
                await job.task
        if not job.ended:  # cancelled before its first step in the event loop
            self._end(job, "cancelled")

    def status(self, job: Job) -> dict[str, Any]:
        """The job as its client sees it, without the result."""
        told: dict[str, Any] = {
            "id": job.id,
            "object": "image.job",
            "status": job.state,
            "created": job.created,
        }
        if job.state == "queued":
            waiting = job.handle.queue_position() if job.handle else None
            if waiting is not None:
                told["position"] = waiting.position
            left = waiting.expected_s if waiting else None
        else:
            left = job.seconds_left() if job.state == "running" else None
        if job.steps is not None:
            told["progress"] = {"step": job.step, "steps": job.steps}
        if left is not None:
            told["expected_s"] = round(left, 1)
        if job.error is not None:
            told["error"] = {**error_body(job.error)["error"], "status": status_of(job.error)}
        return told

    def result(self, job: Job, base: str | None) -> list[bytes]:
        """The answer that the request would have had, as JSON in pieces; reads files, so it belongs into a
        thread.

        Args:
            base: what comes before a stored picture's name in its `url`; None: there are no addresses.

        Raises:
            NotFoundError: the pictures' time is over, or newer ones took their room.
        """
        images: list[ImageFinished] = []
        for image, name in job.images:
            data = self._storage.read(name)
            if data is None:
                raise NotFoundError("The images of this job are gone; their time is over.")
            images.append(replace(image, data=data))
        urls = None if base is None else [base + name for _, name in job.images]
        return job.endpoint.to_response(job.asked, images, urls, job.created)

    async def _run(self, job: Job, handle: RequestHandle, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await self._collect(job, handle)
            self._end(job, "succeeded")
        except asyncio.CancelledError:
            self._end(job, "cancelled")
        except TimeoutError:
            self._end(job, "failed", DeadlineExceededError("The job was not finished within its time."))
        except RequestError as error:
            self._end(job, "failed", job.asked.with_client_field_names(error))
        except Exception:  # the outer edge: nobody else waits for this task
            logger.exception("%s failed.", job.id)
            self._end(job, "failed", GenerationError("The server failed on this job; its log says why."))

    async def _collect(self, job: Job, handle: RequestHandle) -> None:
        kind = OUTPUT_FORMATS[job.asked.generation.output_format]
        async for event in handle:
            if isinstance(event, Started):
                job.state, job.started_at = "running", time.monotonic()
            elif isinstance(event, Progress):
                job.step, job.steps = event.step, event.steps
            elif isinstance(event, ImageFinished):
                name = await asyncio.to_thread(self._storage.put, event.data, kind.extension, kind.media_type)
                job.images.append((replace(event, data=b""), name))
        if len(job.images) != job.asked.generation.n:
            raise GenerationError("The engine ended the job before all images were generated.")
        if job.asked.price is not None:
            job.asked.price.count()
        job.images.sort(key=lambda picture: picture[0].index)

    def _end(self, job: Job, state: JobState, error: RequestError | None = None) -> None:
        job.state, job.error, job.ended_at = state, error, time.monotonic()
        if job.handle is not None:
            job.handle.cancel()
            job.handle = None
        job.asked = job.asked.without_input_images()
        if job.id in self._jobs:  # so that those that have ended stand in that order
            self._jobs.move_to_end(job.id)

    def _forget_old(self) -> None:
        before = time.monotonic() - self._lifetime_s
        old = [job.id for job in self._jobs.values() if job.ended_at is not None and job.ended_at < before]
        for job_id in old:
            del self._jobs[job_id]

    def _forget_one(self) -> bool:
        """Make room; False if no job has ended."""
        first = next((job.id for job in self._jobs.values() if job.ended), None)
        if first is not None:
            del self._jobs[first]
        return first is not None
