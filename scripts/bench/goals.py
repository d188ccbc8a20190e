"""What is measured of each model, and the goals that it must reach on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from hypergen.errors import ConfigurationError
from scripts.bench.device import (
    LABELS,
    MEASUREMENTS,
    NEEDS_CUDA,
    PROFILE,
    SLOW_ON_CPU,
    VARIANTS,
    Measured,
    Plan,
    Speed,
)
from scripts.bench.figures import median_ratio
from scripts.bench.gates import Gate, bytes_gate
from scripts.bench.published import PUBLISHED

_OTHER = Plan(steps=30, batch_size=8)
# At 1024x1024 a batch is hardly more efficient than single images, so only those are measured.
PLANS = {
    "sd15": Plan(steps=30, batch_size=8),
    "sdxl": Plan(steps=30, batch_size=1, trace_side=512),
    "flux-dev": Plan(steps=28, batch_size=1, trace_side=512),
}
SINGLE_IMAGE_S = {"sdxl": 1.17, "flux-dev": 4.1}
BATCH_IMAGES_PER_S, MIN_BATCH_ROWS = 6.0, 8
TRACE_LOAD, TRACE_THROUGHPUT, TRACE_SHORT_P95 = 1.5, 1.4, 10.0


def plan_for(
    name: str,
    device: str,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    only: Sequence[str] | None = None,
    profile: bool = False,
    minutes: float = 8,
) -> Plan:
    """The plan for a model, with the values of the command line.

    Raises:
        ConfigurationError: one of `only` cannot be measured on a CPU.
    """
    plan = PLANS.get(name, _OTHER)
    skipped = NEEDS_CUDA if device == "cpu" else set[str]()
    if refused := skipped.intersection(only or ()):
        raise ConfigurationError(f"--only {','.join(sorted(refused))} needs --device cuda.")
    if only is None and device == "cpu":
        skipped = skipped | SLOW_ON_CPU
    chosen = [m for m in MEASUREMENTS if m not in skipped and (only is None or m in only)]
    return replace(
        plan,
        steps=steps or plan.steps,
        batch_size=batch_size or plan.batch_size,
        measurements=(*chosen, *([PROFILE] if profile else ())),
        minutes=minutes,
    )


def goals(measured: Measured) -> tuple[list[Gate], list[str]]:
    """The goals of a published model with a measurement, and the names of those without.

    A goal for a number of steps is only measured with that number.
    """
    if measured.model not in PUBLISHED:
        return [], []
    results = dict(_goals(measured))
    gates = [gate for gate in results.values() if gate is not None]
    return gates, [what for what, gate in results.items() if gate is None]


def _goals(measured: Measured) -> Iterator[tuple[str, Gate | None]]:
    name, steps = measured.model, PLANS[measured.model].steps
    ours = [speed for speed in measured.speeds if speed.way in VARIANTS and measured.plan.steps == steps]
    if name in SINGLE_IMAGE_S:
        what = f"{name}: a single image of {measured.side}x{measured.side} in {steps} steps, s"
        best = min(ours, key=lambda speed: speed.alone_s, default=None)
        limit = SINGLE_IMAGE_S[name]
        yield what, best and Gate(_with_way(what, best), best.alone_s, limit, at_most=True)
    else:
        what = f"{name}: images/s in batches of at least {MIN_BATCH_ROWS} rows"
        full = [speed for speed in ours if speed.batch_rows >= MIN_BATCH_ROWS]
        best = max(full, key=lambda speed: speed.batch_images_per_s, default=None)
        yield what, best and Gate(_with_way(what, best), best.batch_images_per_s, BATCH_IMAGES_PER_S)
    loaded = [run for run in measured.runs if run.load == TRACE_LOAD]
    ratios = median_ratio(loaded, "step", "sequential") if loaded else None
    what = f"{name}: mixed trace at load {TRACE_LOAD:g}, against sequential: "
    for figure, limit in (("throughput", TRACE_THROUGHPUT), ("short_p95_s", TRACE_SHORT_P95)):
        title = what + {"throughput": "throughput", "short_p95_s": "p95 of short jobs"}[figure]
        yield title, ratios and Gate(title, getattr(ratios, figure), limit)
    equal, total = measured.same_bytes
    yield f"{name}: bytes of the trace's images", bytes_gate(name, equal, total) if total else None


def _with_way(what: str, speed: Speed) -> str:
    return f"{what} ({LABELS[speed.way]})"
