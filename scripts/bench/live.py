"""The engine in its own thread with a wall clock, as in an engine process."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hypergen.config import EngineSettings
from hypergen.engine.engine import Engine
from hypergen.engine.request_queue import RequestQueue
from hypergen.errors import RequestError
from hypergen.events import Event, ImageFinished
from hypergen.models.family import Family
from scripts.bench.clock import Clock
from scripts.bench.jobs import Job
from scripts.bench.policies import Arrivals, FinishedJob, request_for
from scripts.bench.work import family_of


class LiveEngine:
    """An engine after its warm-up, with all batch sizes probed.

    Attributes:
        side: height and width of the images, in pixels.
        mean_batch_size: images per batch of the latest run.
        files: PNG files of the latest run, by job number.
    """

    def __init__(self, family: Family, side: int, settings: EngineSettings) -> None:
        self.side = side
        self.mean_batch_size = 1.0
        self.files: dict[int, bytes] = {}
        self._finished_at: dict[int, float] = {}
        self._changed = threading.Condition()
        self._ready = False
        self._closing = False
        self._queue = RequestQueue()
        self._error: Exception | None = None
        self.engine = Engine(family, "benchmark", settings, self._report)
        # The warm-up runs in the same thread, because CUDA graphs belong to a thread.
        self._thread = threading.Thread(target=self._run_thread, name="engine")
        self._thread.start()
        self._wait_until(lambda: self._ready)

    def run(self, jobs: Sequence[Job], interval_s: float) -> list[FinishedJob]:
        """Run all jobs with a mean interval of `interval_s` seconds between arrivals."""
        self._finished_at.clear()
        self.files.clear()
        before = self.engine.status()
        queued_at: dict[int, float] = {}
        clock = Clock(time.monotonic)
        started = time.monotonic() - clock()
        arrivals = Arrivals(jobs, interval_s, clock)
        while arrivals:
            for arrived_at, job in arrivals.pop_arrived():
                queued_at[job.number] = started + arrived_at
                self._queue.submit(request_for(job, self.side))
            time.sleep(0.0005)
        self._wait_until(lambda: len(self._finished_at) == len(jobs))
        after = self.engine.status()
        self.mean_batch_size = (after.image_steps - before.image_steps) / (after.forwards - before.forwards)
        return [FinishedJob(job, queued_at[job.number], self._finished_at[job.number]) for job in jobs]

    def close(self) -> None:
        self._closing = True
        self._queue.cancel("")  # wakes up the thread
        self._thread.join()

    def _run_thread(self) -> None:
        try:
            self.engine.warm_up()
            with torch.inference_mode():
                self.engine.shape_profiles.finish_probes()
            with self._changed:
                self._ready = True
                self._changed.notify_all()
            self._run_engine()
        except Exception as error:  # raised again in the waiting thread
            self._fail(error)

    def _run_engine(self) -> None:
        sleep_s = 0.0
        while not self._closing:
            for message in self._queue.read(sleep_s):
                if not isinstance(message, str):
                    self.engine.add_request(message)
            sleep_s = self.engine.step()
        self.engine.close()

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._error is not None)
        if self._error is not None:
            raise self._error

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _report(self, request_id: str, event: Event | RequestError) -> None:
        if isinstance(event, RequestError):
            self._fail(event)
        elif isinstance(event, ImageFinished):
            now = time.monotonic()
            with self._changed:
                self._finished_at[int(request_id)] = now
                self.files[int(request_id)] = event.data
                self._changed.notify_all()


@contextmanager
def live_engine(pipeline: Any, side: int, settings: EngineSettings) -> Iterator[LiveEngine]:
    """A running engine for the block.

    Args:
        pipeline: the engine changes its networks.
        side: height and width of the images, in pixels.
    """
    # Without a prompt cache: prompts repeat between runs, and diffusers encodes them each time.
    settings = settings.model_copy(update={"prompt_cache_mb": 0})
    engine = LiveEngine(family_of(pipeline, side, settings), side, settings)
    try:
        yield engine
    finally:
        engine.close()


def free_memory() -> None:
    """Drop compiled code and free unused device memory."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
