"""A clock that can skip idle time."""

from __future__ import annotations

import time
from collections.abc import Callable


class Clock:
    """Seconds of one thread's CPU time, or of a wall clock; idle time is skipped instead of slept through.

    CPU time does not count other processes, so ratios hold on a busy machine. With more than one thread, or
    with a GPU, use a wall clock.
    """

    def __init__(self, source: Callable[[], float] = time.thread_time) -> None:
        self._source = source
        self._skipped = -source()

    def __call__(self) -> float:
        return self._source() + self._skipped

    def skip_to(self, time_s: float) -> None:
        """Advance the clock to a later time; an earlier one does nothing."""
        self._skipped += max(0.0, time_s - self())
