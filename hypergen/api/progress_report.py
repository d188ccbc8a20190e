"""The progress of a streamed request: its place in the queue, its steps, and the expected seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass

from hypergen.engine_protocol import RequestHandle
from hypergen.events import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressReport:
    """What a client is told between two images.

    Attributes:
        position: number of requests before it in the queue; None: it runs.
        step, steps: denoising steps done and in total, over all images; None: not started.
        expected_s: estimated seconds until the end; None before the first measurement.
    """

    position: int | None = None
    step: int | None = None
    steps: int | None = None
    expected_s: float | None = None


class ProgressReporter:
    """Makes the reports of one request."""

    def __init__(self, handle: RequestHandle) -> None:
        self._handle = handle
        self._started_at = 0.0  # monotonic seconds
        self._steps = Progress(0, 0)

    def start(self) -> None:
        """The request has left the queue."""
        self._started_at = time.monotonic()

    def advance(self, progress: Progress) -> None:
        self._steps = progress

    def report(self) -> ProgressReport:
        queued = self._handle.queue_position()
        if queued is not None:
            return ProgressReport(position=queued.position, expected_s=_rounded(queued.expected_s))
        step, steps = self._steps.step, self._steps.steps
        if not step:
            return ProgressReport()
        elapsed = time.monotonic() - self._started_at
        return ProgressReport(step=step, steps=steps, expected_s=_rounded(elapsed / step * (steps - step)))


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
