"""The measurements of one model on one device, in their order, and their results."""

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
from scripts.bench.policies import FinishedJob, StaticBatching
from scripts.bench.rows import Shape
from scripts.bench.work import GUIDANCE_SCALE, Work

STOCK, DEFAULT, ROWS, TRACE = "stock", "default", "rows", "trace"
STOCK_COMPILED, PROFILE = "stock-compiled", "profile"
# Engine settings that differ from the defaults.
VARIANTS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "graphs-off": {"cuda_graphs": False},
    "fast": {"determinism": "fast"},
    "compile": {"compile": "on"},
}
# The most important ones first, because time may run out.
MEASUREMENTS = (STOCK, DEFAULT, ROWS, "graphs-off", "fast", "compile", TRACE, STOCK_COMPILED)
NEEDS_CUDA = {"graphs-off"}
SLOW_ON_CPU = {"compile", STOCK_COMPILED}
LABELS = {
    STOCK: "diffusers",
    STOCK_COMPILED: "diffusers, compiled",
    DEFAULT: "HyperGen",
    "graphs-off": "HyperGen, `--no-cuda-graphs`",
    "fast": "HyperGen, `--determinism fast`",
    "compile": "HyperGen, `--compile on`",
}
_SINGLE_IMAGES = 4  # the first one is a warm-up


@dataclass(frozen=True)
class Plan:
    """What to measure of one model.

    Attributes:
        steps: denoising steps of single images and of those in a batch.
        batch_size: images that are requested at once.
        trace_side: height and width of the images of the mixed trace, in pixels; None: the model's default.
        measurements: some of `MEASUREMENTS`, and `PROFILE`.
        minutes: time for all of them; none starts later.
    """

    steps: int
    batch_size: int
    trace_side: int | None = None
    measurements: tuple[str, ...] = MEASUREMENTS
    minutes: float = 8


@dataclass(frozen=True)
class Speed:
    """The speed of diffusers or of a variant of the engine, with guidance.

    Attributes:
        way: a key of `LABELS`.
        alone_s: seconds of a single image.
        batch_images_per_s: images per second with `Plan.batch_size` images at once.
        batch_rows: mean rows of their forward passes, without padding.
        alone_of_floor, batch_of_floor: the shortest possible time divided by the measured one.
        peak_gb: most memory that tensors took on the GPU, weights among them; None on a CPU.
    """

    way: str
    alone_s: float
    alone_of_floor: float
    batch_images_per_s: float
    batch_of_floor: float
    batch_rows: float
    peak_gb: float | None


@dataclass
class Measured:
    """The results for one model.

    Attributes:
        dtype, vae_dtype: of the weights in the engine.
        seconds: measurement -> its duration, in order.
        shapes: forward passes by row count, for each size.
        same_bytes: images of the trace with the same bytes when generated alone, and all of them.
        device_busy: share of the time in which the GPU ran kernels while images overlapped.
        goals, unmeasured: goals with and without a measurement.
        left_out: what was not measured -> the reason.
    """

    model: str
    side: int
    dtype: str
    vae_dtype: str
    environment: dict[str, Any]
    plan: Plan
    work: Work
    seconds: dict[str, float] = field(default_factory=dict)
    speeds: list[Speed] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    same_bytes: tuple[int, int] = (0, 0)
    device_busy: float | None = None
    goals: list[Gate] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def stock(pipeline: Any, side: int, batch_size: int, *, compiled: bool) -> StaticBatching:
    """Diffusers with static batches of `batch_size` images; compiles the networks of `pipeline`."""
    if compiled:
        compile_network(pipeline.components.get("unet") or pipeline.transformer)
        pipeline.vae.decoder.compile(dynamic=False)
    return StaticBatching(pipeline, side, batch_size, Clock(time.monotonic))


def time_images(run: Callable[[Sequence[Job]], list[FinishedJob]], plan: Plan) -> tuple[float, float]:
    """Seconds of a single image, and of a batch of `plan.batch_size`; each image has its own prompt."""
    jobs = [Job(number, 0, plan.steps, GUIDANCE_SCALE) for number in range(_SINGLE_IMAGES + plan.batch_size)]
    single, batch = jobs[:_SINGLE_IMAGES], jobs[_SINGLE_IMAGES:]
    alone_s = statistics.median([run([job])[0].latency_s for job in single][1:])
    if plan.batch_size == 1:
        return alone_s, alone_s
    run(batch)  # a warm-up for this batch size
    finished = run(batch)
    return alone_s, max(job.finished_at for job in finished) - min(job.queued_at for job in finished)
