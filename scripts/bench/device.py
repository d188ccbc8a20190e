"""Speed of one model on one device: stock diffusers, and the engine with each optimization setting."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hypergen.engine.compiled_forward import compile_network
from scripts.bench.clock import Clock
from scripts.bench.figures import Run
from scripts.bench.gates import Gate
from scripts.bench.jobs import Job
from scripts.bench.live import copy_pipeline
from scripts.bench.policies import FinishedJob, StaticBatching
from scripts.bench.timeline import Share
from scripts.bench.work import GUIDANCE_SCALE, Work

DEFAULT = "as by default"
OURS = "HyperGen, "  # and a variant
STOCK, STOCK_COMPILED = "stock, eager", "stock, compiled"
VARIANTS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "compile": {"compile": "on"},
    "cuda_graphs off": {"cuda_graphs": False},
}
_SINGLE_IMAGES = 4  # the first one is a warm-up


@dataclass(frozen=True)
class Plan:
    """The measurements of one model.

    Attributes:
        steps: denoising steps of single images and of those in a batch.
        batch_size: images that are requested at once.
        trace_side: height and width of the images of the mixed trace, in pixels; None: the model's default.
        trace_batch: `max_batch_size` of the engine for the trace.
        variants: names of `VARIANTS`; the last one that the device supports runs the trace.
    """

    steps: int
    batch_size: int
    trace_side: int | None
    trace_batch: int
    variants: tuple[str, ...]


@dataclass(frozen=True)
class Speed:
    """The speed of stock diffusers or of a variant of the engine, with guidance.

    Attributes:
        way: for example "stock, compiled" or "HyperGen, compile".
        alone_s: seconds of a single image.
        batch_images_per_s: images per second with `Plan.batch_size` images at once.
        batch_rows: mean rows of their forward passes.
        alone_of_floor, batch_of_floor: the shortest possible time divided by the measured one.
    """

    way: str
    alone_s: float
    alone_of_floor: float
    batch_images_per_s: float
    batch_of_floor: float
    batch_rows: float


@dataclass
class Measured:
    """The results for one model.

    Attributes:
        served_by: `Speed.way` of the engine that ran the trace.
        forwards: `forwards_of` each engine.
        unmeasured: goals without a measurement.
        left_out: what was not measured -> the reason.
    """

    model: str
    side: int
    determinism: str
    environment: dict[str, Any]
    plan: Plan
    work: Work
    served_by: str = ""
    speeds: list[Speed] = field(default_factory=list)
    forwards: list[dict[str, Any]] = field(default_factory=list)
    stages: list[Share] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    goals: list[Gate] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def stock(pipeline: Any, side: int, batch_size: int, *, compiled: bool) -> StaticBatching:
    """Stock diffusers with static batches of `batch_size` images."""
    if compiled:
        pipeline = copy_pipeline(pipeline)
        compile_network(denoiser_of(pipeline))
        pipeline.vae.decoder.compile(dynamic=False)
    return StaticBatching(pipeline, side, batch_size, Clock(time.monotonic))


def denoiser_of(pipeline: Any) -> Any:
    return pipeline.components.get("unet") or pipeline.transformer


def speed_of(
    way: str,
    run: Callable[[Sequence[Job]], list[FinishedJob]],
    images_per_forward: Callable[[], float],
    plan: Plan,
    work: Work,
) -> Speed:
    """Measure single images one after another, then a batch; each image has its own prompt."""
    jobs = [Job(number, 0, plan.steps, GUIDANCE_SCALE) for number in range(_SINGLE_IMAGES + plan.batch_size)]
    single, batch = jobs[:_SINGLE_IMAGES], jobs[_SINGLE_IMAGES:]
    alone_s = statistics.median([run([job])[0].latency_s for job in single][1:])
    if plan.batch_size > 1:
        run(batch)  # a warm-up for this batch size
        finished = run(batch)
        batch_s = max(job.finished_at for job in finished) - min(job.queued_at for job in finished)
    else:
        batch_s = alone_s
    floor_s = work.floor_s(plan.steps)
    images_per_s = plan.batch_size / batch_s
    rows = work.rows * images_per_forward()
    return Speed(way, alone_s, floor_s / alone_s, images_per_s, images_per_s * floor_s, rows)
