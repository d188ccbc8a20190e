"""The keys of jobs in Redis, and the commands on them. `jobs.lua` has those that must be atomic.

hypergen:queue        stream of job ids, read by the consumer group `replicas`
hypergen:job:ID       hash: the request, its state, progress and error
hypergen:images:ID    hash: index -> image file of a job that succeeded
hypergen:waiting      sorted set of waiting jobs, in order of their creation
hypergen:unfinished   sorted set of unfinished jobs by deadline
hypergen:ended        sorted set of ended jobs by their end
hypergen:totals       hash: memory of input images and images, unfinished jobs of each API key
hypergen:rate:KEY     sorted set: images of an API key in the last minute
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from hypergen.api.job_store import JobState
from hypergen.api.redis_jobs.connection import redis_errors
from hypergen.api.redis_jobs.records import Fields, encode_error
from hypergen.errors import DeadlineExceededError, RequestError
from hypergen.request import ApiKey

_PREFIX = "hypergen:"
_QUEUE = _PREFIX + "queue"
_GROUP = "replicas"
_SCRIPT = Path(__file__).with_name("jobs.lua").read_text(encoding="utf-8")
TOO_LATE = "The job did not finish before its deadline."

Submitted = Literal["done", "full", "inputs_full", "key_full", "key_rate"]
Finished = Literal["done", "ended", "unknown"]


class Entry(NamedTuple):
    """An entry of the queue, delivered to this replica."""

    id: bytes
    job_id: str


@dataclass(frozen=True)
class QueueLimits:
    """
    Args:
        lifetime_s: seconds for which a job is kept after its end.
        max_jobs: kept jobs, finished and unfinished; for a new one, the job that ended first is removed.
        max_image_bytes: of ended jobs; beyond it, the job that ended first is removed.
        max_input_bytes: of unfinished jobs, as stored.
    """

    lifetime_s: float
    max_jobs: int
    max_image_bytes: int
    max_input_bytes: int


@dataclass(frozen=True)
class Beat:
    """What a replica reports about one of its jobs."""

    entry: Entry
    state: JobState
    step: int = 0
    steps: int | None = None
    ends_at: float | None = None  # estimated Unix time


class JobQueue:
    """Every method raises UnavailableError if Redis is away.

    Args:
        replica: name of this replica, which no other one has.
    """

    def __init__(self, redis: Redis, replica: str, limits: QueueLimits) -> None:
        self._redis = redis
        self._replica = replica
        self._limits = limits
        self._scanned = b"0-0"
        self._script = redis.register_script(_SCRIPT)

    async def _call(self, command: str, *arguments: bytes | str | float) -> Any:
        with redis_errors():
            return await self._script(keys=[_QUEUE], args=[_PREFIX, command, *arguments])

    async def submit(
        self, job_id: str, fields: Mapping[str, bytes], deadline: float, api_key: ApiKey, n: int
    ) -> tuple[Submitted, int]:
        """Add a job, unless a limit forbids it.

        Args:
            fields: of its record.
            deadline: Unix time.
            n: its images.

        Returns:
            The position of the new job; for `key_rate` the seconds until the key may have `n` images.
        """
        limits = self._limits
        input_bytes = sum(len(fields[name]) for name in ("image", "mask", "control") if name in fields)
        outcome, number = await self._call(
            "submit",
            job_id,
            f"{job_id} {input_bytes} {api_key.name}",
            deadline,
            limits.lifetime_s,
            limits.max_jobs,
            limits.max_image_bytes,
            limits.max_input_bytes,
            input_bytes,
            api_key.name,
            _or_empty(api_key.max_requests),
            _or_empty(api_key.images_per_minute),
            n,
            encode_error(DeadlineExceededError(TOO_LATE)),
            *(part for item in fields.items() for part in item),
        )
        return outcome.decode(), number

    async def get(self, job_id: str) -> tuple[Fields, int | None]:
        """The record of a job, empty if it is unknown, and its position if it waits."""
        fields, position = await self._call("get", job_id)
        return _fields(fields), position if position >= 0 else None

    async def images(self, job_id: str) -> dict[int, bytes]:
        """The image files of a job by their index."""
        with redis_errors():
            files = cast(dict[bytes, bytes], await self._redis.hgetall(_PREFIX + "images:" + job_id))  # type: ignore[misc]
        return {int(index): file for index, file in files.items()}

    async def create_group(self) -> None:
        """Create queue and group, also after Redis lost them."""
        with redis_errors():
            try:
                await self._redis.xgroup_create(_QUEUE, _GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    async def read(self, count: int, wait_s: float) -> list[Entry]:
        """Up to `count` new entries; waits for the first one."""
        with redis_errors():
            reply: Any = await self._redis.xreadgroup(
                _GROUP, self._replica, {_QUEUE: ">"}, count=count, block=round(wait_s * 1000)
            )
        return [entry for _, entries in reply for entry in _entries(entries)]

    async def take_over(self, count: int, silent_s: float) -> list[Entry]:
        """Up to `count` entries of replicas that sent no heartbeat for `silent_s`."""
        with redis_errors():
            reply: Any = await self._redis.xautoclaim(
                _QUEUE, _GROUP, self._replica, round(silent_s * 1000), self._scanned, count=count
            )
        self._scanned = reply[0]  # one call looks at ten times `count` entries
        return _entries(reply[1])

    async def take(self, entry: Entry) -> Fields:
        """Count the delivery of a job to this replica; returns its record, empty if the job has ended."""
        return _fields(await self._call("take", entry.job_id, entry.id, self._replica))

    async def beat(self, beats: Iterable[Beat]) -> set[str]:
        """Keep jobs and report their progress; returns those that are no longer this replica's."""
        arguments: list[bytes | str | float] = [self._replica]
        for beat in beats:
            steps = "" if beat.steps is None else beat.steps
            step = "" if beat.steps is None else beat.step
            ends_at = "" if beat.ends_at is None else beat.ends_at
            arguments += [beat.entry.job_id, beat.entry.id, beat.state, step, steps, ends_at]
        return {job.decode() for job in await self._call("beat", *arguments)}

    async def waiting(self) -> int:
        """How many jobs wait for their first step, in the whole fleet."""
        with redis_errors():
            return await self._redis.zcard(_PREFIX + "waiting")

    async def release(self, entry: Entry) -> None:
        """Leave a job to other replicas, which take it over at once."""
        await self._call("release", entry.job_id, entry.id, self._replica)

    async def finish(
        self,
        job_id: str,
        state: JobState,
        error: RequestError | None = None,
        images: bytes = b"",
        files: Mapping[int, bytes] | None = None,
        steps: int | None = None,
    ) -> Finished:
        """End a job, unless it has ended. Everything is written at once.

        Args:
            images: what is known about the finished images.
            files: image files by their index.
            steps: all of which were done; None if not all were.
        """
        outcome = await self._call(
            "finish",
            job_id,
            state,
            "" if error is None else encode_error(error),
            images,
            self._limits.lifetime_s,
            self._limits.max_image_bytes,
            _or_empty(steps),
            *(part for item in (files or {}).items() for part in item),
        )
        return outcome.decode()

    async def forget_replicas(self, silent_s: float) -> None:
        """Remove replicas from the group that were silent for longer and have no jobs left."""
        await self._call("forget_replicas", silent_s)


def _or_empty(value: int | None) -> int | str:
    return "" if value is None else value


def _fields(flat: list[bytes]) -> Fields:
    return {name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)}


def _entries(reply: Iterable[tuple[bytes, dict[bytes, bytes] | None]]) -> list[Entry]:
    # An entry that was deleted after its delivery has no fields.
    return [Entry(entry_id, fields[b"job"].decode()) for entry_id, fields in reply if fields]
