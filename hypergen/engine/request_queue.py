"""The request queue of an engine process: messages from other threads to the thread that owns the models."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import suppress

from hypergen.request import GenerationRequest

# Events of other threads, for example a lost device, are noticed within this time.
_MAX_SLEEP_S = 1.0
# A request to add, or the id of a request to cancel.
Message = GenerationRequest | str


class RequestQueue:
    """Messages in order of arrival. `read` belongs to the engine's thread, the rest to any thread."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def submit(self, request: GenerationRequest) -> None:
        self._messages.put(request)

    def cancel(self, request_id: str) -> None:
        self._messages.put(request_id)

    def read(self, sleep_s: float = 0.0) -> Iterator[Message]:
        """All messages. If there are none, wait up to `sleep_s` seconds for the first."""
        timeout_s = min(sleep_s, _MAX_SLEEP_S)
        with suppress(queue.Empty):
            yield self._messages.get(timeout=timeout_s) if timeout_s else self._messages.get_nowait()
            while True:
                yield self._messages.get_nowait()
