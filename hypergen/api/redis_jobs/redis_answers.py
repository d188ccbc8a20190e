"""Answers to requests with an `Idempotency-Key`, which all replicas share.

hypergen:answer:DIGEST   hash: who answers the request, its fingerprint, and then its answer
hypergen:answers         sorted set of answers by age
hypergen:answer_totals   memory of all answers
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from hypergen.api.errors import to_json
from hypergen.api.idempotency import OVERHEAD_BYTES, Claim, Key, SharedAnswers
from hypergen.api.redis_jobs.connection import redis_errors
from hypergen.api.responses import Answer
from hypergen.errors import UnavailableError

logger = logging.getLogger(__name__)

_PREFIX = "hypergen:"
_SCRIPT = Path(__file__).with_name("answers.lua").read_text(encoding="utf-8")
# A replica that does not keep its claim for this long is dead.
_CLAIM_S = 10
_KEEP_EVERY_S = 2.0
# A plain request does not wait longer for Redis.
_TIMEOUT_S = 2.0


class RedisAnswers(SharedAnswers):
    """See `SharedAnswers`.

    Args:
        lifetime_s: seconds for which an answer is kept.
        max_bytes: memory in Redis; beyond it, the oldest answers are dropped.
    """

    def __init__(self, redis: Redis, lifetime_s: float, max_bytes: int) -> None:
        self._script = redis.register_script(_SCRIPT)
        self._lifetime_s = lifetime_s
        self._max_bytes = max_bytes

    async def claim(self, key: Key, digest: bytes, owner: str) -> Claim | None:
        fields = await self._call("claim", key, owner, digest, _CLAIM_S)
        return _claim(fields) if fields else None

    @asynccontextmanager
    async def keep(self, key: Key, owner: str) -> AsyncGenerator[None]:
        ended = asyncio.Event()
        keeping = asyncio.create_task(self._keep(key, owner, ended))
        try:
            yield
        finally:
            ended.set()  # too, because the client swallows a cancellation now and then
            keeping.cancel()

    async def put(self, key: Key, owner: str, answer: Answer) -> Answer:
        nbytes = OVERHEAD_BYTES + answer.nbytes
        if nbytes > self._max_bytes:
            await self.free(key, owner)
            return answer
        fields: dict[str, bytes | str] = {
            "status": str(answer.status),
            "headers": to_json(answer.headers),
            "model": to_json(answer.model),
            "request_id": answer.request_id,
            "body": b"".join(answer.pieces),
        }
        pairs = (part for item in fields.items() for part in item)
        first = await self._call("put", key, owner, self._lifetime_s, self._max_bytes, nbytes, *pairs)
        return _claim(first).answer or answer if first else answer

    async def free(self, key: Key, owner: str) -> None:
        await self._call("free", key, owner)

    async def _keep(self, key: Key, owner: str, ended: asyncio.Event) -> None:
        while not ended.is_set():
            await asyncio.sleep(_KEEP_EVERY_S)
            try:
                await self._call("keep", key, owner, _CLAIM_S)
            except UnavailableError as error:
                logger.debug("A claim could not be kept: %s", error.__cause__)

    async def _call(self, command: str, key: Key, owner: str, *arguments: bytes | str | float) -> Any:
        name = hashlib.sha256("\0".join(key).encode()).hexdigest()
        with redis_errors():
            async with asyncio.timeout(_TIMEOUT_S):
                return await self._script(
                    keys=[f"{_PREFIX}answer:{name}"], args=[_PREFIX, command, owner, *arguments]
                )


def _claim(flat: list[bytes]) -> Claim:
    fields = {name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)}
    answer = None
    if "status" in fields:
        answer = Answer(
            int(fields["status"]),
            json.loads(fields["headers"]),
            [fields["body"]],
            json.loads(fields["model"]),
            fields["request_id"].decode(),
        )
    return Claim(fields["fingerprint"], answer)
