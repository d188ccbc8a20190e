"""One replica: a GPU whose running images advance together, one denoising step per round."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence

Job = tuple[int, int, float]  # number of the request, index of its model, steps


class Replica:
    """Continuous batching of one engine, without a loop over its steps.

    In a round each running image takes one step: one forward pass for each model that has any. Between an
    arrival and the end of an image all rounds take equally long, so an image ends `steps` rounds after its
    start. Images beyond `max_batch_size` wait, in order of arrival. All models are in memory.

    Args:
        seconds: for each model, seconds of a forward pass of 0, 1, 2 ... images.
    """

    __slots__ = (
        "_at",
        "_ends",
        "_images",
        "_max_batch_size",
        "_round_s",
        "_rounds",
        "_seconds",
        "busy_s",
        "connections",
        "ends_at",
        "forwards",
        "image_steps",
        "version",
        "waiting",
    )

    def __init__(self, seconds: Sequence[Sequence[float]], max_batch_size: int) -> None:
        self.waiting: deque[Job] = deque()
        self.connections = 0  # running and waiting
        self.ends_at = math.inf  # when the next image ends
        self.version = 0  # of `ends_at`
        self.busy_s = self.forwards = self.image_steps = 0.0
        self._seconds = seconds
        self._max_batch_size = max_batch_size
        self._images = [0] * len(seconds)  # running, of each model
        self._ends: list[tuple[float, int, int]] = []  # round, request, model: a heap
        self._rounds = 0.0
        self._round_s = 0.0
        self._at = 0.0

    def add(self, now: float, job: Job) -> bool:
        """Take a request; returns whether it runs at once."""
        self.connections += 1
        if len(self._ends) >= self._max_batch_size:
            self.waiting.append(job)
            return False
        self._advance(now)
        self._start(job)
        self._plan()
        return True

    def finish(self, now: float) -> tuple[int, int | None]:
        """End the image that is due; returns its request, and the one that starts instead."""
        self._advance(now)
        _, request, model = heapq.heappop(self._ends)
        self._images[model] -= 1
        self.connections -= 1
        started = None
        if self.waiting:
            job = self.waiting.popleft()
            self._start(job)
            started = job[0]
        self._plan()
        return request, started

    def _advance(self, now: float) -> None:
        if self._ends:
            seconds = now - self._at
            rounds = seconds / self._round_s
            self._rounds += rounds
            self.busy_s += seconds
            self.image_steps += rounds * len(self._ends)
            self.forwards += rounds * sum(images > 0 for images in self._images)
        self._at = now

    def _start(self, job: Job) -> None:
        request, model, steps = job
        heapq.heappush(self._ends, (self._rounds + steps, request, model))
        self._images[model] += 1

    def _plan(self) -> None:
        self.version += 1
        self._round_s = sum(of[images] for of, images in zip(self._seconds, self._images, strict=True))
        left = self._ends[0][0] - self._rounds if self._ends else math.inf
        self.ends_at = self._at + max(0.0, left) * self._round_s if self._ends else math.inf
