"""One model on one device against the device's own limit: hypergen bench --device cuda."""

from __future__ import annotations

import copy
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hypergen.bench.clock import Clock
from hypergen.bench.jobs import Job
from hypergen.bench.models import RandomModel
from hypergen.bench.policies import Arrivals, Served, WholeBatches, request_for
from hypergen.config import EngineSettings
from hypergen.engine.determinism import synchronize
from hypergen.engine.engine import Engine
from hypergen.errors import ModelError, RequestError
from hypergen.generation import Event, ImageFinished
from hypergen.models.sd import StableDiffusion

# What each setting gives by itself, and what a GPU may like together.
VARIANTS: dict[str, dict[str, Any]] = {
    "as by default": {},
    "channels_last": {"channels_last": True},
    "attention=flash": {"attention": "flash"},
    "attention=cudnn": {"attention": "cudnn"},
    "decode_stream": {"decode_stream": True},
    "vectorised_steps off": {"vectorised_steps": False},
    "compile": {"compile": "on"},
    "compile=graphs": {"compile": "graphs"},
    "all of it": {"compile": "graphs", "channels_last": True, "decode_stream": True},
}


@dataclass(frozen=True)
class Work:
    """What one picture costs in arithmetic.

    Attributes:
        peak_flops: floating point operations a second of a large matrix product on this device.
        forward_flops, decode_flops: of one row of the denoiser, of one picture of the decoder.
    """

    peak_flops: float
    forward_flops: float
    decode_flops: float

    def floor_s(self, rows: int, steps: int) -> float:
        """Seconds below which no picture can be drawn at this precision; text encoding not counted."""
        return (rows * steps * self.forward_flops + self.decode_flops) / self.peak_flops


@dataclass(frozen=True)
class Speed:
    """One way of drawing: seconds for a lone guided picture, and pictures a second in a crowd."""

    way: str
    alone_s: float
    alone_of_floor: float
    crowd_per_s: float
    crowd_of_floor: float


def work_of(pipeline: Any, latent_side: int) -> Work:
    """Count the operations of a pipeline, and measure what its device can do."""
    device, dtype = pipeline.unet.device, pipeline.unet.dtype
    side = 8192 if device.type == "cuda" else 1024
    with torch.inference_mode():
        matrix = torch.randn(side, side, device=device, dtype=dtype)
        seconds = [_timed(lambda: matrix @ matrix) for _ in range(8)]
    return Work(2 * side**3 / min(seconds), *operations_of(pipeline.unet, pipeline.vae, latent_side))


def operations_of(unet: Any, vae: Any, latent_side: int) -> tuple[float, float]:
    """Floating point operations of one row of the denoiser and of one decoded picture; the networks may be on
    the meta device.
    """
    device, dtype = unet.device, unet.dtype
    latents = torch.zeros(1, unet.config.in_channels, latent_side, latent_side, device=device, dtype=dtype)
    embeds = torch.zeros(1, 77, unet.config.cross_attention_dim, device=device, dtype=dtype)
    with torch.inference_mode():
        forward_flops = _flops(lambda: unet(latents, 1, encoder_hidden_states=embeds))
        return forward_flops, _flops(lambda: vae.decode(latents))


def _flops(call: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _timed(call: Callable[[], torch.Tensor]) -> float:
    started = time.monotonic()
    synchronize(call())
    return time.monotonic() - started


class Live:
    """The engine in a thread of its own, on the wall's clock, as it serves."""

    def __init__(self, model: StableDiffusion, side: int, settings: EngineSettings) -> None:
        self.side = side
        self.images_per_pass = 1.0
        self._finished: dict[int, tuple[float, bytes]] = {}
        self._news = threading.Condition()
        self._ready = False
        self._error: Exception | None = None
        self.engine = Engine(model, "benchmark", settings, self._report)
        # Warms up in the same thread, to which CUDA graphs belong.
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._wait_until(lambda: self._ready)

    def serve(self, jobs: Sequence[Job], interval_s: float) -> list[Served]:
        self._finished.clear()
        before = self.engine.status()
        arrived: dict[int, float] = {}
        clock = Clock(time.monotonic)
        started = time.monotonic() - clock()
        arrivals = Arrivals(jobs, interval_s, clock)
        while arrivals:
            for moment, job in arrivals.take():
                arrived[job.number] = started + moment
                self.engine.submit(request_for(job, self.side))
            time.sleep(0.0005)
        self._wait_until(lambda: len(self._finished) == len(jobs))
        after = self.engine.status()
        self.images_per_pass = (after.image_steps - before.image_steps) / (after.forwards - before.forwards)
        return [Served(job, arrived[job.number], self._finished[job.number][0]) for job in jobs]

    def close(self) -> None:
        self.engine.stop()
        self._thread.join()

    def _run(self) -> None:
        try:
            self.engine.warm_up()
            while not self.engine.idle:  # until its probes are whole, and all sizes of a pass are compiled
                self.engine.turn()
        except Exception as error:  # the edge of this thread: whoever waits shall hear of it
            self._tell(error)
            return
        with self._news:
            self._ready = True
            self._news.notify_all()
        self.engine.run()

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
            with self._news:
                self._finished[int(request_id)] = (time.monotonic(), event.data)
                self._news.notify_all()


def speeds(
    model: RandomModel,
    settings: EngineSettings,
    steps: int,
    crowd: int,
    repeats: int,
    variants: Sequence[str] = tuple(VARIANTS),
) -> Iterator[tuple[Speed, Live | None]]:
    """Stock diffusers, eager and compiled, then the engine with each setting; what a device cannot do is
    left out. A live engine is closed when the next one is asked for.

    Args:
        crowd: pictures that are asked for at once.
    """
    device, dtype = settings.device or "cpu", getattr(torch, settings.dtype or "float32")
    pipeline = model.pipeline().to(device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    work = work_of(pipeline, model.latent_side)

    def speed(way: str, serve: Callable[[Sequence[Job]], list[Served]]) -> Speed:
        jobs = [Job(number, 0, steps, 5.0) for number in range(max(crowd, repeats + 1))]
        lone = [serve([job])[0].latency_s for job in jobs[: repeats + 1]]
        alone_s = statistics.median(lone[1:])
        served = serve(jobs[:crowd])
        took_s = max(job.finished_at for job in served) - min(job.arrived_at for job in served)
        floor_s = work.floor_s(rows=2, steps=steps)
        return Speed(way, alone_s, floor_s / alone_s, crowd / took_s, crowd / took_s * floor_s)

    for way in ("stock, eager", "stock, compiled"):
        stock = copy.deepcopy(pipeline)
        if way.endswith("compiled"):
            if device == "cpu":  # takes minutes, and is slower than eager there
                continue
            stock.unet.compile(dynamic=False)
            stock.vae.decoder.compile(dynamic=False)
        whole = WholeBatches(stock, model.side, crowd, Clock(time.monotonic))
        yield speed(way, lambda jobs, whole=whole: whole.serve(jobs, 0)), None
        del stock, whole
    for name in variants:
        changed = settings.model_copy(update=VARIANTS[name])
        try:
            live = Live(StableDiffusion(copy.deepcopy(pipeline), {}, changed), model.side, changed)
        except ModelError:
            continue
        try:
            yield speed(f"HyperGen, {name}", lambda jobs, live=live: live.serve(jobs, 0)), live
        finally:
            live.close()
