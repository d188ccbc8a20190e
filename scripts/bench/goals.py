"""What is measured of each model on a GPU, and what it must reach there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from scripts.bench.device import DEFAULT, OURS, VARIANTS, Plan, Speed
from scripts.bench.figures import Run, median_ratio
from scripts.bench.gates import Gate
from scripts.bench.published import PUBLISHED
from scripts.bench.timeline import PASS, Share

_FOR_TRANSFORMERS = "all for transformers"
_FOR_UNETS = tuple(name for name in VARIANTS if name != _FOR_TRANSFORMERS)
# For a graph the whole transformer would have to be compiled for each size of a pass, and launches are hidden
# by its arithmetic.
_LEFT_OUT = {"compile=graphs", "all of it"}
_FOR_FLUX = tuple(name for name in VARIANTS if name not in _LEFT_OUT)

_OTHER = Plan(steps=30, crowd=8, trace_side=None, trace_batch=8, variants=_FOR_UNETS)
# At 1024x1024 a second picture costs what the first one costs, so there is no crowd.
PLANS = {
    "sd15": Plan(steps=30, crowd=8, trace_side=512, trace_batch=8, variants=_FOR_UNETS),
    "sdxl": Plan(steps=30, crowd=1, trace_side=512, trace_batch=4, variants=_FOR_UNETS),
    "flux-dev": Plan(steps=28, crowd=1, trace_side=512, trace_batch=4, variants=_FOR_FLUX),
    "tiny-flux": replace(_OTHER, variants=_FOR_FLUX),
}
LONE_S = {"sdxl": 1.17, "flux-dev": 4.1}
CROWD_PER_S, CROWD_ROWS = 6.0, 8
TRACE_LOAD, TRACE_THROUGHPUT, TRACE_SHORT_P95 = 1.5, 1.4, 10.0
# Ours: the issue asks for these stages off the critical path and names no number.
HOLDING_UP = 0.05


def plan_for(
    name: str, device: str, steps: int | None, crowd: int | None, variants: tuple[str, ...] | None
) -> Plan:
    """The plan of a published model, or one like it for another, with what the command line says instead."""
    plan = PLANS.get(name, _OTHER)
    if variants is None and device == "cpu":  # which takes minutes to compile
        quick = [variant for variant in plan.variants if "compile" not in VARIANTS[variant]]
        variants = (*(variant for variant in quick if VARIANTS[variant]), DEFAULT)
    return replace(
        plan,
        steps=steps or plan.steps,
        crowd=crowd or plan.crowd,
        trace_batch=crowd or plan.trace_batch,
        variants=variants or plan.variants,
    )


def goals(
    name: str, plan: Plan, speeds: Sequence[Speed], runs: Sequence[Run], stages: Sequence[Share]
) -> Iterator[Gate]:
    """The goals that these measurements can answer; they are for CUDA.

    Args:
        name: of a published model; others have no goals.
    """
    if name not in PUBLISHED:
        return
    side, steps = PUBLISHED[name].side, plan.steps
    ours = [speed for speed in speeds if speed.way.startswith(OURS)]
    if name in LONE_S and ours and steps == PLANS[name].steps:
        best = min(ours, key=lambda speed: speed.alone_s)
        what = f"{name}: a lone picture of {side}x{side} in {steps} steps, s ({best.way})"
        yield Gate(what, best.alone_s, LONE_S[name], at_most=True)
    full = [speed for speed in ours if speed.crowd_rows >= CROWD_ROWS]
    if name not in LONE_S and full and steps == PLANS[name].steps:
        best = max(full, key=lambda speed: speed.crowd_per_s)
        what = f"{name}: pictures a second in passes of {best.crowd_rows:.0f} rows ({best.way})"
        yield Gate(what, best.crowd_per_s, CROWD_PER_S)
    if loaded := [run for run in runs if run.load == TRACE_LOAD]:
        ratios = median_ratio(loaded, "step", "sequential")
        what = f"{loaded[0].model}: mixed trace at load {TRACE_LOAD:g}, against call after call: "
        yield Gate(what + "throughput", ratios.throughput, TRACE_THROUGHPUT)
        yield Gate(what + "p95 of short jobs", ratios.short_p95_s, TRACE_SHORT_P95)
    if held := [share.holding_up for share in stages if share.stage != PASS]:
        what = f"{name}: share of the time in which all that is not a pass holds up passes"
        yield Gate(what, sum(held), HOLDING_UP, at_most=True)


def unanswered(name: str, gates: Sequence[Gate]) -> list[str]:
    """What a published model must reach and nothing was measured for."""
    if name not in PUBLISHED:
        return []
    first = (
        "a lone picture" if name in LONE_S else f"pictures a second in passes of at least {CROWD_ROWS} rows"
    )
    parts = (first, "throughput", "p95 of short jobs", "holds up passes")
    return [part for part in parts if not any(part.split(" of at least")[0] in gate.what for gate in gates)]
