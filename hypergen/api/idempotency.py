"""The header `Idempotency-Key`: a repeated POST gets the answer of the first, and starts no work.

Source: https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

from starlette.requests import Request

from hypergen.api.disconnects import cancel, client_disconnected, run_until_disconnect
from hypergen.api.request_record import RequestRecord
from hypergen.api.responses import Answer
from hypergen.errors import ConflictError, InvalidRequestError, UnavailableError

HEADER = "Idempotency-Key"
MAX_CHARACTERS = 255
_KEY = re.compile(rf"[!-~]{{1,{MAX_CHARACTERS}}}", re.ASCII)
# Memory of an answer in addition to its body.
OVERHEAD_BYTES = 2048
# Between two looks at a request that another server runs.
_POLL_S = 0.2

# The API key's name and the value of the header.
Key = tuple[str, str]
# Makes the answer of a request; its argument returns when no client waits any more.
Work = Callable[[Callable[[], Awaitable[object]]], Awaitable[Answer]]


def idempotency_key(request: Request) -> str | None:
    """The value of the header; None without one.

    Raises:
        InvalidRequestError: the value is too long or has other characters than visible ASCII.
    """
    values = request.headers.getlist(HEADER)
    if not values:
        return None
    if len(values) > 1 or not _KEY.fullmatch(values[0]):
        raise InvalidRequestError(
            f"'{HEADER}' must be 1 to {MAX_CHARACTERS} visible ASCII characters.", param=HEADER
        )
    return values[0]


def fingerprint(route: str, body: dict[str, Any]) -> bytes:
    """A digest of a route and the parsed fields of a body.

    Not of the body's bytes, because a client that sends a form again chooses another boundary.
    """
    digest = hashlib.sha256(route.encode())

    def add(value: Any) -> None:
        if isinstance(value, dict):
            fields = cast(dict[str, Any], value)
            digest.update(b"{%d:" % len(fields))
            for name in sorted(fields):
                add(name)
                add(fields[name])
        elif isinstance(value, list):
            items = cast(list[Any], value)
            digest.update(b"[%d:" % len(items))
            for item in items:
                add(item)
        else:
            is_file = isinstance(value, bytes)
            data: bytes = value if is_file else str(value).encode("utf-8", "surrogatepass")
            digest.update(b"%s %d:" % (type(value).__name__.encode(), len(data)))
            digest.update(data)

    add(body)
    return digest.digest()


@dataclass(frozen=True)
class StoredAnswer:
    """An answer, and the fingerprint of the request that it answers."""

    fingerprint: bytes
    answer: Answer
    expires_at: float  # monotonic seconds

    @property
    def nbytes(self) -> int:
        return OVERHEAD_BYTES + self.answer.nbytes


class StoredAnswers:
    """Answers in this process's memory, by key.

    Args:
        lifetime_s: seconds for which an answer is kept.
        max_bytes: limit; beyond it, the oldest answers are dropped.
    """

    def __init__(self, lifetime_s: float, max_bytes: int) -> None:
        self._lifetime_s = lifetime_s
        self._max_bytes = max_bytes
        self._answers: OrderedDict[Key, StoredAnswer] = OrderedDict()
        self._nbytes = 0

    def get(self, key: Key) -> StoredAnswer | None:
        self._drop_expired()
        return self._answers.get(key)

    def put(self, key: Key, digest: bytes, answer: Answer) -> None:
        """Keep the first answer of a key, if it is not larger than the limit."""
        stored = StoredAnswer(digest, answer, time.monotonic() + self._lifetime_s)
        self._drop_expired()
        if key in self._answers or stored.nbytes > self._max_bytes:
            return
        self._answers[key] = stored
        self._nbytes += stored.nbytes
        while self._nbytes > self._max_bytes:
            self._drop_oldest()

    def _drop_expired(self) -> None:
        while self._answers and next(iter(self._answers.values())).expires_at <= time.monotonic():
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, stored = self._answers.popitem(last=False)
        self._nbytes -= stored.nbytes


@dataclass(frozen=True)
class Claim:
    """What is known about a key that another request has: its answer is None while that runs."""

    fingerprint: bytes
    answer: Answer | None


class SharedAnswers(Protocol):
    """Answers that several servers share. Every method raises UnavailableError if their store is away.

    An owner is one request that has claimed a key. Its claim expires if its server does not keep it.
    """

    async def claim(self, key: Key, digest: bytes, owner: str) -> Claim | None:
        """Claim a key; returns the claim of another request if that was first."""
        ...

    def keep(self, key: Key, owner: str) -> AbstractAsyncContextManager[None]:
        """Keep a claim within a block."""
        ...

    async def put(self, key: Key, owner: str, answer: Answer) -> Answer:
        """Keep the first answer of a key; returns that one."""
        ...

    async def free(self, key: Key, owner: str) -> None:
        """Give up a claim: the request failed, and may be sent again."""
        ...


@dataclass(eq=False)
class _Running:
    """A request whose answer is not known yet, and the number of clients that wait for it."""

    fingerprint: bytes
    task: asyncio.Task[Answer]
    clients: int = 0


@dataclass(eq=False)
class IdempotentRequests:
    """Answers requests with the header: runs the first of a key, and repeats its answer.

    Only answers without an error are repeated, so a failed request may be sent again.
    """

    answers: StoredAnswers
    shared: SharedAnswers | None = None
    _running: dict[Key, _Running] = field(default_factory=dict[Key, _Running])

    async def answer(
        self, request: Request, key: str | None, route: str, body: dict[str, Any], work: Work
    ) -> Answer:
        """The answer of `work`, or that of the first request with this key.

        Args:
            key: value of the header; None runs `work` for this client alone.
            route: path of the route.
            body: parsed; a repeated request empties it.

        Raises:
            ConflictError: the first request with this key had another route or body.
            ClientDisconnectedError: the client disconnected.
            RequestError: the request failed.
        """
        if key is None:
            return await work(partial(client_disconnected, request))
        digest = await asyncio.to_thread(fingerprint, route, body)  # a body may have megabytes
        name = request.state.api_key.name, key
        record: RequestRecord = request.state.record
        running = self._running.get(name)
        first = running or self.answers.get(name)
        if first is not None:
            body.clear()
            request.state.body.release()
            _check_same(first, digest)
        if isinstance(first, StoredAnswer):
            record.repeat(first.answer.model, first.answer.request_id)
            return first.answer.repeated()
        if running is None:
            task = asyncio.create_task(self._run(name, digest, work))
            running = self._running[name] = _Running(digest, task)
            task.add_done_callback(lambda _: self._forget(name, running))
            answer = await self._wait(request, name, running)
            if answer.is_repeated:  # from another server
                record.repeat(answer.model, answer.request_id)
            return answer
        answer = await self._wait(request, name, running)
        record.repeat(answer.model, answer.request_id)
        return answer.repeated()

    async def _run(self, name: Key, digest: bytes, work: Work) -> Answer:
        wait_for_clients = asyncio.Event().wait  # the last client that leaves cancels this task
        if self.shared is None:
            answer = await work(wait_for_clients)
        else:
            answer = await self._run_once(self.shared, name, digest, partial(work, wait_for_clients))
        self.answers.put(name, digest, answer)
        return answer

    async def _run_once(
        self, shared: SharedAnswers, name: Key, digest: bytes, work: Callable[[], Awaitable[Answer]]
    ) -> Answer:
        """The answer of `work`, or that of another server's request with this key."""
        owner = uuid.uuid4().hex
        try:
            while (other := await shared.claim(name, digest, owner)) is not None:
                _check_same(other, digest)
                if other.answer is not None:
                    return other.answer.repeated()
                await asyncio.sleep(_POLL_S)
        except UnavailableError:  # a job fails by itself, and other requests need no shared answers
            return await work()
        try:
            async with shared.keep(name, owner):
                answer = await work()
        except BaseException:
            with suppress(UnavailableError):
                await shared.free(name, owner)
            raise
        with suppress(UnavailableError):
            return await shared.put(name, owner, answer)
        return answer

    async def _wait(self, request: Request, name: Key, running: _Running) -> Answer:
        running.clients += 1
        try:
            waiting = asyncio.shield(running.task)
            return await run_until_disconnect(waiting, client_disconnected(request), request.state.deadline)
        finally:
            running.clients -= 1
            if not running.clients:
                self._forget(name, running)  # before the wait, in which a repeat could join a cancelled task
                await cancel(running.task)

    def _forget(self, name: Key, running: _Running) -> None:
        if self._running.get(name) is running:
            del self._running[name]


def _check_same(first: _Running | StoredAnswer | Claim, digest: bytes) -> None:
    """
    Raises:
        ConflictError: the first request with this key had another route or body.
    """
    if first.fingerprint != digest:
        raise ConflictError(
            f"'{HEADER}' was used before for another request; use a new one for each request.",
            param=HEADER,
        )
