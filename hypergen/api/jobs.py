"""Jobs in this process's memory. Their images are in the storage of `url` results, with its lifetime."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field, replace

from hypergen.api.dialects.endpoint import Endpoint
from hypergen.api.image_urls import store_image_of_job, urls_of
from hypergen.api.job_store import JobState, JobStatus, JobStore, report_end
from hypergen.api.request_record import RequestRecord
from hypergen.api.responses import write
from hypergen.api.validated_request import ValidatedRequest
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

logger = logging.getLogger(__name__)


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

    def status(self) -> JobStatus:
        queued = self.handle.queue_position() if self.handle and self.state == "queued" else None
        left = self._seconds_left() if self.state == "running" else None
        return JobStatus(
            id=self.id,
            state=self.state,
            created=self.created,
            validated=self.validated,
            position=queued.position if queued else None,
            step=self.step,
            steps=self.steps,
            expected_s=queued.expected_s if queued else left,
            error=self.error,
        )

    def _seconds_left(self) -> float | None:
        """Estimate from the mean time of the steps so far; None before the first step."""
        if not self.step or self.steps is None:
            return None
        return (time.monotonic() - self.started_at) / self.step * (self.steps - self.step)


class MemoryJobs(JobStore):
    """The jobs of this server.

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

    async def start(self) -> None:
        pass

    async def submit(
        self, endpoint: Endpoint, validated: ValidatedRequest, record: RequestRecord, deadline: float
    ) -> JobStatus:
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
        return job.status()

    async def get(self, job_id: str) -> JobStatus:
        return self.find(job_id).status()

    async def cancel(self, job_id: str) -> JobStatus:
        job = self.find(job_id)
        await self._stop(job)
        return job.status()

    async def result(self, job: JobStatus, base: str | None) -> list[bytes]:
        found = self.find(job.id)
        images: list[ImageFinished] = []
        for image, name in found.images:
            data = await self._storage.read(name)
            if data is None:
                raise NotFoundError("The images of this job have expired.")
            images.append(replace(image, data=data))
        names = [name for _, name in found.images]
        urls = None if base is None else await urls_of(self._storage, names, base)
        return await write(found.endpoint.to_response, found.validated, images, urls, found.created)

    async def close(self) -> None:
        """Cancel all jobs, also those that have expired."""
        await asyncio.gather(*(self._stop(job) for job in self._jobs.values()), return_exceptions=True)

    def find(self, job_id: str) -> Job:
        """Raises NotFoundError if the job is unknown or has expired."""
        self._remove_expired()
        job = self._jobs.get(job_id)
        if job is None:
            raise NotFoundError("The job does not exist or has expired.")
        return job

    async def _stop(self, job: Job) -> None:
        if job.task is not None and not job.task.done():
            job.task.cancel()
            with suppress(asyncio.CancelledError):
                await job.task
        if not job.ended:  # the task was cancelled before it ran
            self._end(job, "cancelled")

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
        report_end(job.id, job.validated.generation, state, error, job.ended_at - job.created_at)
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
