"""Clocks that can skip idle time."""

from __future__ import annotations

import time
from collections.abc import Callable


class Clock:
    """Seconds of one thread's CPU time, or of the wall; idle time is skipped and not slept through.

    CPU time does not count what other processes take from this one, so that ratios hold on a busy machine.
    With more than one thread, or with a device that works by itself, only the wall tells the truth.
    """

    def __init__(self, source: Callable[[], float] = time.thread_time) -> None:
        self._source = source
        self._skipped = -source()

    def __call__(self) -> float:
        return self._source() + self._skipped

    def skip_to(self, moment: float) -> None:
        """Let a later moment be now; an earlier one changes nothing."""
        self._skipped += max(0.0, moment - self())
