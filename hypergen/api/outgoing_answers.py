"""Outgoing: the memory of finished images whose clients have not taken them yet, with a limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(eq=False)
class Outgoing:
    """One answer on its way.

    Args:
        cut: ends the request.
    """

    memory: OutgoingMemory
    cut: Callable[[], None]
    held_bytes: int = 0
    moved_at: float = field(default_factory=time.monotonic)

    def hold(self, size: int) -> None:
        """So many bytes more wait for the client; others may have to go for them."""
        if not self.held_bytes:  # until now there was nothing to take
            self.moved()
        self.held_bytes += size
        self.memory.make_room(self)

    def taken(self, size: int) -> None:
        self.held_bytes -= size

    def moved(self) -> None:
        """The client took something."""
        self.moved_at = time.monotonic()


class OutgoingMemory:
    """All answers of a server. Beyond the limit, the ones whose clients have taken nothing for the longest
    time are cut, but not the one that just came.
    """

    def __init__(self, max_bytes: float) -> None:
        self._max_bytes = max_bytes
        self._answers: set[Outgoing] = set()

    def open(self, cut: Callable[[], None]) -> Outgoing:
        """An answer, to be closed when it has ended."""
        answer = Outgoing(self, cut)
        self._answers.add(answer)
        return answer

    def close(self, answer: Outgoing) -> None:
        self._answers.discard(answer)

    def make_room(self, latest: Outgoing) -> None:
        while sum(answer.held_bytes for answer in self._answers) > self._max_bytes:
            others = [answer for answer in self._answers if answer is not latest and answer.held_bytes]
            if not others:
                return
            slowest = min(others, key=lambda answer: answer.moved_at)
            self._answers.discard(slowest)
            slowest.cut()
