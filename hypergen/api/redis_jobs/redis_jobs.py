"""`RedisJobs`: jobs that every replica of a fleet creates, runs, answers and cancels."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

from cachetools import TTLCache
from redis.asyncio import Redis

from hypergen.api.dialects.endpoint import Endpoint
from hypergen.api.image_urls import store_images, urls_of
from hypergen.api.job_store import JobStatus, JobStore, report_end
from hypergen.api.redis_jobs.job_queue import JobQueue, QueueLimits, Submitted
from hypergen.api.redis_jobs.records import (
    Fields,
    decode_error,
    decode_images,
    decode_request,
    encode_request,
)
from hypergen.api.redis_jobs.worker import Worker
from hypergen.api.request_record import RequestRecord
from hypergen.api.responses import write
from hypergen.api.validated_request import ValidatedRequest
from hypergen.config import Settings
from hypergen.engine_protocol import ImageGenerator
from hypergen.errors import (
    InvalidRequestError,
    NotFoundError,
    QueueFullError,
    StorageFullError,
    UnavailableError,
)
from hypergen.events import ImageFinished
from hypergen.images.storage import ImageStorage
from hypergen.request import ApiKey

_RETRY_AFTER_S = 5
_FULL_RETRY_AFTER_S = 60


class RedisJobs(JobStore):
    """See `JobStore`.

    Args:
        redis: which it closes.
        storage: for `url` results; the replica that answers stores their files.
    """

    def __init__(
        self, redis: Redis, settings: Settings, generator: ImageGenerator, storage: ImageStorage
    ) -> None:
        server = settings.server
        self._max_jobs = server.max_jobs
        self._generator = generator
        self._storage = storage
        self._redis = redis
        limits = QueueLimits(
            lifetime_s=server.url_lifetime_s,
            max_jobs=server.max_jobs,
            max_image_bytes=int(server.url_storage_mb * 1e6),
            max_input_bytes=int(settings.queue.max_input_image_mb * 1e6),
        )
        self._queue = JobQueue(self._redis, f"replica_{uuid.uuid4().hex}", limits)
        self._worker = Worker(self._queue, generator, settings)
        # Job -> names of its stored images, so that a client that asks again stores nothing.
        self._stored: TTLCache[str, list[str]] = TTLCache(server.max_jobs, server.url_lifetime_s)

    async def start(self) -> None:
        self._worker.start()

    async def close(self) -> None:
        """Leave the jobs of this replica to the others."""
        await self._worker.close()
        await self._redis.aclose()

    async def submit(
        self, endpoint: Endpoint, validated: ValidatedRequest, record: RequestRecord, deadline: float
    ) -> JobStatus:
        request = validated.generation
        _check_rate(request.api_key, request.n)
        state = self._generator.status().state
        if state in ("draining", "failed"):
            raise UnavailableError("This server takes no new jobs.", code=state, retry_after_s=_RETRY_AFTER_S)
        job_id, created = f"job_{uuid.uuid4().hex}", time.time()
        fields = await asyncio.to_thread(encode_request, endpoint, validated)
        ends_at = created + deadline - asyncio.get_running_loop().time()
        fields |= {"created": repr(created).encode(), "deadline": repr(ends_at).encode()}
        outcome, number = await self._queue.submit(job_id, fields, ends_at, request.api_key, request.n)
        if outcome != "done":
            raise self._refusal(outcome, request.api_key, number)
        return JobStatus(
            id=job_id, state="queued", created=int(created), validated=validated, position=number
        )

    async def get(self, job_id: str) -> JobStatus:
        fields, position = await self._find(job_id)
        _, validated = decode_request(fields)
        state: Any = fields["state"].decode()
        ends_at = fields.get("ends_at")
        return JobStatus(
            id=job_id,
            state=state,
            created=_created(fields),
            validated=validated,
            position=position,
            step=int(fields.get("step", 0)),
            steps=int(fields["steps"]) if "steps" in fields else None,
            expected_s=max(0.0, float(ends_at) - time.time()) if ends_at else None,
            error=decode_error(fields),
        )

    async def cancel(self, job_id: str) -> JobStatus:
        fields, _ = await self._find(job_id)
        if await self._queue.finish(job_id, "cancelled") == "done":
            _, validated = decode_request(fields)
            seconds = time.time() - float(fields["created"])
            report_end(job_id, validated.generation, "cancelled", None, seconds)
            await self._worker.stop(job_id)  # another replica stops at its next heartbeat
        return await self.get(job_id)

    async def result(self, job: JobStatus, base: str | None) -> list[bytes]:
        fields, _ = await self._find(job.id)
        files = await self._queue.images(job.id)
        if len(files) != job.validated.generation.n:
            raise NotFoundError("The images of this job have expired.")
        endpoint, validated = decode_request(fields)
        images = decode_images(fields, files)
        urls = None
        if base is not None:
            try:
                urls = await self._urls(job.id, validated, images, base)
            except (StorageFullError, UnavailableError):
                if validated.response_format == "url":
                    raise
        return await write(endpoint.to_response, validated, images, urls, _created(fields))

    async def _urls(
        self, job_id: str, validated: ValidatedRequest, images: list[ImageFinished], base: str
    ) -> list[str]:
        names = self._stored.get(job_id)
        if names is None:
            names = self._stored[job_id] = await store_images(self._storage, validated.generation, images)
        return await urls_of(self._storage, names, base)

    async def _find(self, job_id: str) -> tuple[Fields, int | None]:
        fields, position = await self._queue.get(job_id)
        if not fields:
            raise NotFoundError("The job does not exist or has expired.")
        return fields, position

    def _refusal(self, outcome: Submitted, api_key: ApiKey, seconds: int) -> QueueFullError:
        match outcome:
            case "key_full":
                message = f"This key's limit of unfinished requests is {api_key.max_requests}."
            case "key_rate":
                message = f"This key has {api_key.images_per_minute} images per minute."
                return QueueFullError(f"{message} Try again in {seconds} s.", retry_after_s=seconds)
            case "inputs_full":
                message = "The input images of unfinished jobs fill the memory for them."
            case _:
                message = f"There are {self._max_jobs} unfinished jobs."
        return QueueFullError(f"{message} Try again later.", retry_after_s=_FULL_RETRY_AFTER_S)


def _check_rate(api_key: ApiKey, n: int) -> None:
    """
    Raises:
        InvalidRequestError: the key may never have as many images.
    """
    limit = api_key.images_per_minute
    if limit is not None and n > limit:
        raise InvalidRequestError(
            f"'n' must be at most {limit}: this key has {limit} images per minute.", param="n"
        )


def _created(fields: Fields) -> int:
    return int(float(fields["created"]))
