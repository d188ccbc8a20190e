"""A limit on the memory of responses that slow clients have not read yet."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(eq=False)
class OutgoingResponse:
    """One response that is being sent.

    Args:
        abort: ends the request.
    """

    memory: OutgoingMemory
    abort: Callable[[], None]
    pending_bytes: int = 0  # not read by the client yet
    progress_at: float = field(default_factory=time.monotonic)

    def add_pending(self, size: int) -> None:
        """Count more bytes that wait for the client; may abort other responses."""
        if not self.pending_bytes:  # the client had nothing to read before
            self.record_progress()
        self.pending_bytes += size
        self.memory.enforce_limit(self)

    def remove_pending(self, size: int) -> None:
        self.pending_bytes -= size

    def record_progress(self) -> None:
        """The client has read something."""
        self.progress_at = time.monotonic()


class OutgoingMemory:
    """All responses of a server.

    Beyond the limit, the response whose client has read nothing for the longest time is aborted, except the
    latest one.
    """

    def __init__(self, max_bytes: float) -> None:
        self._max_bytes = max_bytes
        self._responses: set[OutgoingResponse] = set()

    def open(self, abort: Callable[[], None]) -> OutgoingResponse:
        """Register a response; `close` removes it."""
        response = OutgoingResponse(self, abort)
        self._responses.add(response)
        return response

    def close(self, response: OutgoingResponse) -> None:
        self._responses.discard(response)

    def enforce_limit(self, latest: OutgoingResponse) -> None:
        while sum(response.pending_bytes for response in self._responses) > self._max_bytes:
            others = [
                response for response in self._responses if response is not latest and response.pending_bytes
            ]
            if not others:
                return
            slowest = min(others, key=lambda response: response.progress_at)
            self._responses.discard(slowest)
            slowest.abort()
