"""The plan of measurements for each model on a GPU, and the goals that it must reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from scripts.bench.device import DEFAULT, OURS, VARIANTS, Plan, Speed
from scripts.bench.figures import Run, median_ratio
from scripts.bench.gates import Gate
from scripts.bench.published import PUBLISHED
from scripts.bench.timeline import FORWARD, Share

_FOR_TRANSFORMERS = "all for transformers"
_FOR_UNETS = tuple(name for name in VARIANTS if name != _FOR_TRANSFORMERS)
# With CUDA graphs the whole transformer would be compiled for each batch size, and its launches are hidden by
# its arithmetic anyway.
_LEFT_OUT = {"compile=graphs", "all of it"}
_FOR_FLUX = tuple(name for name in VARIANTS if name not in _LEFT_OUT)

_OTHER = Plan(steps=30, batch_size=8, trace_side=None, trace_batch=8, variants=_FOR_UNETS)
# At 1024x1024 a batch is not more efficient than single images, so only those are measured.
PLANS = {
    "sd15": Plan(steps=30, batch_size=8, trace_side=512, trace_batch=8, variants=_FOR_UNETS),
    "sdxl": Plan(steps=30, batch_size=1, trace_side=512, trace_batch=4, variants=_FOR_UNETS),
    "flux-dev": Plan(steps=28, batch_size=1, trace_side=512, trace_batch=4, variants=_FOR_FLUX),
    "tiny-flux": replace(_OTHER, variants=_FOR_FLUX),
}
SINGLE_IMAGE_S = {"sdxl": 1.17, "flux-dev": 4.1}
BATCH_IMAGES_PER_S, MIN_BATCH_ROWS = 6.0, 8
TRACE_LOAD, TRACE_THROUGHPUT, TRACE_SHORT_P95 = 1.5, 1.4, 10.0
# The largest share of the time that other stages may delay forward passes; our own limit.
MAX_HOLDING_UP = 0.05


def plan_for(
    name: str, device: str, steps: int | None, batch_size: int | None, variants: tuple[str, ...] | None
) -> Plan:
    """The plan for a model, with the values of the command line."""
    plan = PLANS.get(name, _OTHER)
    if variants is None and device == "cpu":  # compilation takes minutes
        uncompiled = [variant for variant in plan.variants if "compile" not in VARIANTS[variant]]
        variants = (*(variant for variant in uncompiled if VARIANTS[variant]), DEFAULT)
    return replace(
        plan,
        steps=steps or plan.steps,
        batch_size=batch_size or plan.batch_size,
        trace_batch=batch_size or plan.trace_batch,
        variants=variants or plan.variants,
    )


def goals(
    name: str, plan: Plan, speeds: Sequence[Speed], runs: Sequence[Run], stages: Sequence[Share]
) -> Iterator[Gate]:
    """The goals that these measurements answer; for CUDA.

    Args:
        name: the model; only published models have goals.
    """
    if name not in PUBLISHED:
        return
    side, steps = PUBLISHED[name].side, plan.steps
    ours = [speed for speed in speeds if speed.way.startswith(OURS)]
    if name in SINGLE_IMAGE_S and ours and steps == PLANS[name].steps:
        best = min(ours, key=lambda speed: speed.alone_s)
        what = f"{name}: a single image of {side}x{side} in {steps} steps, s ({best.way})"
        yield Gate(what, best.alone_s, SINGLE_IMAGE_S[name], at_most=True)
    full = [speed for speed in ours if speed.batch_rows >= MIN_BATCH_ROWS]
    if name not in SINGLE_IMAGE_S and full and steps == PLANS[name].steps:
        best = max(full, key=lambda speed: speed.batch_images_per_s)
        what = f"{name}: images/s in batches of {best.batch_rows:.0f} rows ({best.way})"
        yield Gate(what, best.batch_images_per_s, BATCH_IMAGES_PER_S)
    if loaded := [run for run in runs if run.load == TRACE_LOAD]:
        ratios = median_ratio(loaded, "step", "sequential")
        what = f"{loaded[0].model}: mixed trace at load {TRACE_LOAD:g}, against sequential: "
        yield Gate(what + "throughput", ratios.throughput, TRACE_THROUGHPUT)
        yield Gate(what + "p95 of short jobs", ratios.short_p95_s, TRACE_SHORT_P95)
    if delays := [share.holding_up for share in stages if share.stage != FORWARD]:
        what = f"{name}: share of the time in which other stages hold up forward passes"
        yield Gate(what, sum(delays), MAX_HOLDING_UP, at_most=True)


def unmeasured_goals(name: str, gates: Sequence[Gate]) -> list[str]:
    """The goals of a published model without a measurement."""
    if name not in PUBLISHED:
        return []
    first = (
        "a single image"
        if name in SINGLE_IMAGE_S
        else f"images/s in batches of at least {MIN_BATCH_ROWS} rows"
    )
    parts = (first, "throughput", "p95 of short jobs", "hold up forward passes")
    return [part for part in parts if not any(part.split(" of at least")[0] in gate.what for gate in gates)]
