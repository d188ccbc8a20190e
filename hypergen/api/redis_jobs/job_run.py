"""`JobRun`: a job while a replica runs it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from hypergen.api.job_store import JobState
from hypergen.api.redis_jobs.job_queue import Beat, Entry
from hypergen.api.validated_request import ValidatedRequest
from hypergen.events import ImageFinished


@dataclass(eq=False)
class JobRun:
    """A job that this replica runs.

    Attributes:
        created, deadline: Unix times.
        started_at: monotonic.
        generated: it only has to be written.
    """

    entry: Entry
    validated: ValidatedRequest
    created: float
    deadline: float
    state: JobState = "queued"
    step: int = 0
    steps: int | None = None
    started_at: float = 0.0
    generated: bool = False
    images: list[ImageFinished] = field(default_factory=list[ImageFinished])
    task: asyncio.Task[None] | None = None

    def beat(self) -> Beat:
        ends_at = None
        if self.step and self.steps is not None:
            left_s = (time.monotonic() - self.started_at) / self.step * (self.steps - self.step)
            ends_at = time.time() + left_s
        return Beat(self.entry, self.state, self.step, self.steps, ends_at)
