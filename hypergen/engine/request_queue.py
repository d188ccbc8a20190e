"""The request queue of an engine process: what other threads ask of the thread that owns the models."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import suppress

from hypergen.request import GenerationRequest

# Whatever happens in other threads meanwhile, such as a lost device, is noticed after so long.
_LONGEST_SLEEP_S = 1.0
# A request, or the id of one to cancel.
Message = GenerationRequest | str


class RequestQueue:
    """Messages in order; only `read` belongs to the engine's thread."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def submit(self, request: GenerationRequest) -> None:
        self._messages.put(request)

    def cancel(self, request_id: str) -> None:
        self._messages.put(request_id)

    def read(self, sleep_s: float = 0.0) -> Iterator[Message]:
        """All messages; if there are none, those that come within `sleep_s` seconds."""
        timeout_s = min(sleep_s, _LONGEST_SLEEP_S)
        with suppress(queue.Empty):
            yield self._messages.get(timeout=timeout_s) if timeout_s else self._messages.get_nowait()
            while True:
                yield self._messages.get_nowait()
