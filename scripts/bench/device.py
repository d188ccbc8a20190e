"""Ways of drawing with one model on one device: stock diffusers, and the engine with each setting."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hypergen.engine.optimizations import compile_network
from scripts.bench.clock import Clock
from scripts.bench.figures import Run
from scripts.bench.gates import Gate
from scripts.bench.jobs import Job
from scripts.bench.live import own_copy
from scripts.bench.policies import Served, WholeBatches
from scripts.bench.timeline import Share
from scripts.bench.work import GUIDANCE_SCALE, Work

DEFAULT = "as by default"
OURS = "HyperGen, "  # and a variant
STOCK, STOCK_COMPILED = "stock, eager", "stock, compiled"
# What each setting gives by itself, and what a GPU may like together.
VARIANTS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "channels_last": {"channels_last": True},
    "attention=flash": {"attention": "flash"},
    "attention=cudnn": {"attention": "cudnn"},
    "decode_stream": {"decode_stream": True},
    "batched_euler off": {"batched_euler": False},
    "compile": {"compile": "on"},
    "compile=graphs": {"compile": "graphs"},
    "all of it": {"compile": "graphs", "channels_last": True, "decode_stream": True},
    # For transformers over many tokens, whose launches their work hides.
    "all for transformers": {"compile": "on", "decode_stream": True},
}
_LONE_PICTURES = 4  # the first of them warms up


@dataclass(frozen=True)
class Plan:
    """How much of a model is measured.

    Attributes:
        steps: of a lone picture, and of those in a crowd.
        crowd: pictures that are asked for at once.
        trace_side: height and width of the pictures of the mixed trace, in pixels; None: the model's own.
        trace_batch: `max_batch_size` of the engine that serves the trace.
        variants: names of `VARIANTS`; the last one that the device can do serves the trace.
    """

    steps: int
    crowd: int
    trace_side: int | None
    trace_batch: int
    variants: tuple[str, ...]


@dataclass(frozen=True)
class Speed:
    """One way of drawing: seconds for a lone guided picture, and pictures a second in a crowd.

    Attributes:
        crowd_rows: of a forward pass in the crowd, on average.
        alone_of_floor, crowd_of_floor: the shortest possible time over the measured one.
    """

    way: str
    alone_s: float
    alone_of_floor: float
    crowd_per_s: float
    crowd_of_floor: float
    crowd_rows: float


@dataclass
class Measured:
    """Everything that one call finds out about one model.

    Attributes:
        served_by: the way that served the trace.
        passes: what `passes_of` tells of each engine.
        unmeasured: goals that nothing was measured for.
        left_out: ways and parts that were not measured, and why.
    """

    model: str
    side: int
    determinism: str
    environment: dict[str, Any]
    plan: Plan
    work: Work
    served_by: str = ""
    speeds: list[Speed] = field(default_factory=list)
    passes: list[dict[str, Any]] = field(default_factory=list)
    stages: list[Share] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    goals: list[Gate] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def stock(pipeline: Any, side: int, crowd: int, *, compiled: bool) -> WholeBatches:
    """Stock diffusers, with a whole batch for the crowd."""
    if compiled:
        pipeline = own_copy(pipeline)
        compile_network(denoiser_of(pipeline), graphs=False)
        pipeline.vae.decoder.compile(dynamic=False)
    return WholeBatches(pipeline, side, crowd, Clock(time.monotonic))


def denoiser_of(pipeline: Any) -> Any:
    return pipeline.components.get("unet") or pipeline.transformer


def speed_of(
    way: str,
    serve: Callable[[Sequence[Job]], list[Served]],
    images_per_pass: Callable[[], float],
    plan: Plan,
    work: Work,
) -> Speed:
    """Draw lone pictures one after another, then a crowd at once, each picture with a prompt of its own."""
    jobs = [Job(number, 0, plan.steps, GUIDANCE_SCALE) for number in range(_LONE_PICTURES + plan.crowd)]
    lone, crowd = jobs[:_LONE_PICTURES], jobs[_LONE_PICTURES:]
    alone_s = statistics.median([serve([job])[0].latency_s for job in lone][1:])
    if plan.crowd > 1:
        serve(crowd)  # a pass of this size may be the first of its kind
        served = serve(crowd)
        took_s = max(job.finished_at for job in served) - min(job.queued_at for job in served)
    else:
        took_s = alone_s
    floor_s = work.floor_s(plan.steps)
    per_s = plan.crowd / took_s
    rows = work.rows * images_per_pass()
    return Speed(way, alone_s, floor_s / alone_s, per_s, per_s * floor_s, rows)
