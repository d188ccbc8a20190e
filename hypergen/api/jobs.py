"""Asynchronous jobs: image requests whose result is fetched later, for work beyond a proxy's timeout.

Jobs are kept in this process's memory. Their images are in the storage of `url` results, with its lifetime.
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
from hypergen.api.image_urls import store_image_of_job, urls_of
from hypergen.api.request_record import RequestRecord
from hypergen.api.responses import write
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
from hypergen.images.storage import ImageStorage
from hypergen.metrics import outcome_of, record_request
from hypergen.request import ANONYMOUS

logger = logging.getLogger(__name__)

JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]


@dataclass(eq=False)
class Job:
    """One request, its state, and the names of its stored images."""

    id: str
    endpoint: Endpoint
    validated: ValidatedRequest
    record: RequestRecord
    created: int
    handle: RequestHandle | None  # None after the end, to free its memory
    state: JobState = "queued"
    step: int = 0
    steps: int | None = None
    created_at: float = field(default_factory=time.monotonic)
    started_at: float = 0.0  # monotonic seconds
    ended_at: float | None = None
    error: RequestError | None = None
    images: list[tuple[ImageFinished, str]] = field(default_factory=list[tuple[ImageFinished, str]])
    task: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        return self.ended_at is not None

    def seconds_left(self) -> float | None:
        """Estimate from the mean time of the steps so far; None before the first step."""
        if not self.step or self.steps is None:
            return None
        return (time.monotonic() - self.started_at) / self.step * (self.steps - self.step)


class Jobs:
    """The jobs of this server, for one event loop.

    Args:
        lifetime_s: seconds for which a job is kept after its end.
        max_jobs: limit on kept jobs; for a new one, the job that ended first is removed.
    """

    def __init__(
        self,
        generator: ImageGenerator,
        storage: ImageStorage,
        lifetime_s: float,
        max_jobs: int,
    ) -> None:
        self._generator = generator
        self._storage = storage
        self._lifetime_s = lifetime_s
        self._max_jobs = max_jobs
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    async def submit(
        self, endpoint: Endpoint, validated: ValidatedRequest, record: RequestRecord, deadline: float
    ) -> Job:
        """Create a job.

        Args:
            record: of the request that creates it.
            deadline: time of the event loop's clock.

        Raises:
            QueueFullError: too many unfinished jobs, or the request queue is full.
            UnavailableError: no engine is ready, or the storage cannot be reached.
        """
        self._storage.refuse_while_away()
        self._remove_expired()
        if len(self._jobs) >= self._max_jobs and not self._remove_oldest_ended():
            raise QueueFullError(
                f"There are {self._max_jobs} unfinished jobs. Try again later.", retry_after_s=60
            )
        record = record.of_job()
        handle = await self._generator.submit(validated.generation, record.times.observe)
        job = Job(f"job_{uuid.uuid4().hex}", endpoint, validated, record, int(time.time()), handle)
        self._jobs[job.id] = job
        job.task = asyncio.create_task(self._run(job, handle, deadline))
        return job

    def get(self, job_id: str) -> Job:
        """Raises NotFoundError if the job is unknown or has expired."""
        self._remove_expired()
        job = self._jobs.get(job_id)
        if job is None:
            raise NotFoundError("The job does not exist or has expired.")
        return job

    async def cancel(self, job_id: str) -> Job:
        """Cancel a job at the next step; no effect if it has ended."""
        job = self.get(job_id)
        await self._stop(job)
        return job

    async def close(self) -> None:
        """Cancel all jobs, also those that have expired."""
        await asyncio.gather(*(self._stop(job) for job in self._jobs.values()), return_exceptions=True)

    async def _stop(self, job: Job) -> None:
        if job.task is not None and not job.task.done():
            job.task.cancel()
            with suppress(asyncio.CancelledError):
                await job.task
        if not job.ended:  # the task was cancelled before it ran
            self._end(job, "cancelled")

    def status(self, job: Job) -> dict[str, Any]:
        """The body for the client, without the result."""
        body: dict[str, Any] = {
            "id": job.id,
            "object": "image.job",
            "status": job.state,
            "created": job.created,
        }
        if job.state == "queued":
            queued = job.handle.queue_position() if job.handle else None
            if queued is not None:
                body["position"] = queued.position
            left = queued.expected_s if queued else None
        else:
            left = job.seconds_left() if job.state == "running" else None
        if job.steps is not None:
            body["progress"] = {"step": job.step, "steps": job.steps}
        if left is not None:
            body["expected_s"] = round(left, 1)
        if job.error is not None:
            body["error"] = {**error_body(job.error)["error"], "status": status_of(job.error)}
        return body

    async def result(self, job: Job, base: str | None) -> list[bytes]:
        """The response of the request's own route, as pieces of JSON.

        Args:
            base: the URL before a stored image's name; None: without `url`.

        Raises:
            NotFoundError: the images have expired, or newer ones replaced them.
            UnavailableError: their storage cannot be reached.
        """
        images: list[ImageFinished] = []
        for image, name in job.images:
            data = await self._storage.read(name)
            if data is None:
                raise NotFoundError("The images of this job have expired.")
            images.append(replace(image, data=data))
        names = [name for _, name in job.images]
        urls = None if base is None else await urls_of(self._storage, names, base)
        return await write(job.endpoint.to_response, job.validated, images, urls, job.created)

    async def _run(self, job: Job, handle: RequestHandle, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await self._collect(job, handle)
            self._end(job, "succeeded")
        except asyncio.CancelledError:
            self._end(job, "cancelled")
        except TimeoutError:
            self._end(job, "failed", DeadlineExceededError("The job did not finish before its deadline."))
        except RequestError as error:
            self._end(job, "failed", job.validated.with_client_field_names(error))
        except Exception:  # Isolate the failure: nothing awaits this task.
            logger.exception("%s failed.", job.id)
            self._end(job, "failed", GenerationError("The server failed on this job; see its log."))

    async def _collect(self, job: Job, handle: RequestHandle) -> None:
        async for event in handle:
            if isinstance(event, Started):
                job.state, job.started_at = "running", time.monotonic()
            elif isinstance(event, Progress):
                job.step, job.steps = event.step, event.steps
            elif isinstance(event, ImageFinished):
                name = await store_image_of_job(self._storage, job.validated.generation, event)
                job.images.append((replace(event, data=b""), name))
        if len(job.images) != job.validated.generation.n:
            raise GenerationError("The engine ended the job before all images were generated.")
        job.images.sort(key=lambda stored: stored[0].index)

    def _end(self, job: Job, state: JobState, error: RequestError | None = None) -> None:
        job.state, job.error, job.ended_at = state, error, time.monotonic()
        outcome = "cancelled" if state == "cancelled" else outcome_of(status_of(error) if error else 200)
        request, seconds = job.validated.generation, job.ended_at - job.created_at
        record_request("job", request.model, request.api_key.name, outcome, seconds)
        fields: dict[str, Any] = {"ms": round(seconds * 1000), "model": request.model}
        if request.api_key is not ANONYMOUS:
            fields["key"] = request.api_key.name
        if error is not None:
            fields["error_code"] = error.code
        logger.info("Job %s %s", job.id, state, extra={"fields": fields})
        job.record.end_trace()
        if job.handle is not None:
            job.handle.cancel()
            job.handle = None
        job.validated = job.validated.without_input_images()
        if job.id in self._jobs:  # keeps ended jobs in the order of their end
            self._jobs.move_to_end(job.id)

    def _remove_expired(self) -> None:
        before = time.monotonic() - self._lifetime_s
        expired = [
            job.id for job in self._jobs.values() if job.ended_at is not None and job.ended_at < before
        ]
        for job_id in expired:
            del self._jobs[job_id]

    def _remove_oldest_ended(self) -> bool:
        """Remove the job that ended first; False if no job has ended."""
        first = next((job.id for job in self._jobs.values() if job.ended), None)
        if first is not None:
            del self._jobs[first]
        return first is not None
