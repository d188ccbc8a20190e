"""The engine as it serves: in a thread of its own, on the wall's clock."""

from __future__ import annotations

import copy
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
from scripts.bench.policies import Arrivals, Served, request_for
from scripts.bench.work import family_of


class Live:
    """A warm engine with every size of a pass probed and compiled.

    Attributes:
        side: height and width of the pictures, in pixels.
        images_per_pass: mean number of images that shared a forward pass in the latest run.
        file_spans: when threads wrote the files of the latest run, from and to, seconds of the monotonic
            clock.
    """

    def __init__(self, family: Family, side: int, settings: EngineSettings) -> None:
        self.side = side
        self.images_per_pass = 1.0
        self.file_spans: list[tuple[float, float]] = []
        self._finished_at: dict[int, float] = {}
        self._news = threading.Condition()
        self._ready = False
        self._closing = False
        self._queue = RequestQueue()
        self._error: Exception | None = None
        self.engine = Engine(family, "benchmark", settings, self._report)
        # Warms up in the same thread, to which CUDA graphs belong.
        self._thread = threading.Thread(target=self._run, name="engine")
        self._thread.start()
        self._wait_until(lambda: self._ready)

    def serve(self, jobs: Sequence[Job], interval_s: float) -> list[Served]:
        """All jobs, which arrive at a mean distance of `interval_s` seconds."""
        self._finished_at.clear()
        self.file_spans.clear()
        before = self.engine.status()
        arrived: dict[int, float] = {}
        clock = Clock(time.monotonic)
        started = time.monotonic() - clock()
        arrivals = Arrivals(jobs, interval_s, clock)
        while arrivals:
            for moment, job in arrivals.take():
                arrived[job.number] = started + moment
                self._queue.submit(request_for(job, self.side))
            time.sleep(0.0005)
        self._wait_until(lambda: len(self._finished_at) == len(jobs))
        after = self.engine.status()
        self.images_per_pass = (after.image_steps - before.image_steps) / (after.forwards - before.forwards)
        return [Served(job, arrived[job.number], self._finished_at[job.number]) for job in jobs]

    def close(self) -> None:
        self._closing = True
        self._queue.cancel("")  # wakes the thread
        self._thread.join()

    def _run(self) -> None:
        try:
            self.engine.warm_up()
            with torch.inference_mode():  # until its probes are whole, and all sizes of a pass are compiled
                self.engine.shape_profiles.finish_probes()
            with self._news:
                self._ready = True
                self._news.notify_all()
            self._serve_queue()
        except Exception as error:  # the edge of this thread: whoever waits shall hear of it
            self._tell(error)

    def _serve_queue(self) -> None:
        sleep_s = 0.0
        while not self._closing:
            for message in self._queue.read(sleep_s):
                if not isinstance(message, str):
                    self.engine.add_request(message)
            sleep_s = self.engine.step()
        self.engine.close()

    def _wait_until(self, happened: Callable[[], bool]) -> None:
        with self._news:
            self._news.wait_for(lambda: happened() or self._error is not None)
        if self._error is not None:
            raise self._error

    def _tell(self, error: Exception) -> None:
        with self._news:
            self._error = error
            self._news.notify_all()

    def _report(self, request_id: str, event: Event | RequestError) -> None:
        if isinstance(event, RequestError):
            self._tell(event)
        elif isinstance(event, ImageFinished):
            now = time.monotonic()
            with self._news:
                self._finished_at[int(request_id)] = now
                self.file_spans.append((now - event.encode_s, now))
                self._news.notify_all()


@contextmanager
def serving(pipeline: Any, side: int, settings: EngineSettings) -> Iterator[Live]:
    """A live engine for the block.

    Args:
        pipeline: stays as it is, the engine gets networks of its own.
        side: height and width of its pictures, in pixels.
    """
    # Prompts recur from run to run, and stock diffusers encodes them each time.
    settings = settings.model_copy(update={"prompt_cache_mb": 0})
    live = Live(family_of(own_copy(pipeline), side, settings), side, settings)
    try:
        yield live
    finally:
        live.close()


def own_copy(pipeline: Any) -> Any:
    """The same pipeline, but for text encoders with modules of its own: engines and compilers change them."""
    encoders = [module for name, module in pipeline.components.items() if name.startswith("text_encoder")]
    return copy.deepcopy(pipeline, {id(encoder): encoder for encoder in encoders})


def free_memory() -> None:
    """Forget what was compiled, and give back to the device what nobody holds any more."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
