"""Inbox: what other threads tell the engine. A request comes in when what it needs was read from disk."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hypergen.request import GenerationRequest


@dataclass(frozen=True)
class Arrival:
    """A request that can join.

    Attributes:
        prepared: what was read for it, to be kept until it has joined.
        sent_at: by the engine's clock, before that was read.
    """

    request: GenerationRequest
    prepared: Future[Any] | None
    sent_at: float


_IDLE_WAIT_S = 1.0
_PAUSE_S = 0.001
# The id of a request that is not wanted any more; None: stop.
Message = Arrival | str | None


class Inbox:
    """Messages in order; only `read` belongs to the engine's thread.

    Args:
        prepare: begins to read what a request needs; None where there is nothing to read.
        clock: when a request was submitted.
    """

    def __init__(
        self,
        prepare: Callable[[GenerationRequest], Future[Any] | None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._prepare = prepare
        self._clock = clock
        self._messages: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()
        self._preparing: dict[str, Future[Any]] = {}
        self._lock = threading.Lock()

    def submit(self, request: GenerationRequest) -> None:
        sent_at = self._clock()
        try:
            prepared = self._prepare(request)
        except Exception as error:  # raised where the request joins, which fails it alone
            prepared = Future[Any]()
            prepared.set_exception(error)
        if prepared is None:
            self._messages.put(Arrival(request, None, sent_at))
            return
        with self._lock:
            self._preparing[request.id] = prepared
        prepared.add_done_callback(lambda prepared: self._arrive(Arrival(request, prepared, sent_at)))

    def _arrive(self, arrival: Arrival) -> None:
        with self._lock:
            if arrival.request.id in self._preparing:  # else it was cancelled meanwhile
                self._messages.put(arrival)
                del self._preparing[arrival.request.id]

    def cancel(self, request_id: str) -> None:
        with self._lock:
            prepared = self._preparing.pop(request_id, None)
        if prepared is not None:  # outside the lock: those who wait for it are called here
            prepared.cancel()
        self._messages.put(request_id)

    def stop(self) -> None:
        self._messages.put(None)

    def fail(self, error: Exception) -> None:
        """Let `read` raise what went wrong in another thread and concerns more than one request."""
        self._messages.put(error)

    def empty(self) -> bool:
        """Whether nothing is there and no request is being prepared."""
        with self._lock:
            return not self._preparing and self._messages.empty()

    def read(self, *, idle: bool, busy: bool) -> Iterator[Message]:
        """Everything that is there; if nothing is, what comes soon.

        Args:
            idle: there is nothing else to do.
            busy: there are images to draw.

        Raises:
            Exception: what `fail` was told.
        """
        # Neither: files are read for a request, and a loop without a pause would hinder that.
        timeout_s = _IDLE_WAIT_S if idle else 0.0 if busy else _PAUSE_S
        with suppress(queue.Empty):
            message = self._messages.get(timeout=timeout_s) if timeout_s else self._messages.get_nowait()
            while True:
                if isinstance(message, Exception):
                    raise message
                yield message
                message = self._messages.get_nowait()
