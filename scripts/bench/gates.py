"""The gates: ratios that the benchmark must reach on a CPU."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from scripts.bench.figures import Run, median_ratio

SATURATED, OVERHEAD_BOUND = "medium", "small"
LOADS = {OVERHEAD_BOUND: (0.7, 1.5), SATURATED: (1.5,)}
POLICIES = {
    OVERHEAD_BOUND: ("sequential", "static", "step", "step-fast"),
    SATURATED: ("sequential", "step"),
}
MIN_SEEDS, MIN_JOBS = 5, 100


@dataclass(frozen=True)
class Gate:
    """One measured ratio and its limit."""

    what: str
    measured: float
    limit: float
    at_most: bool = False

    @property
    def reached(self) -> bool:
        compare: Callable[[float, float], bool] = operator.le if self.at_most else operator.ge
        return compare(self.measured, self.limit)

    @property
    def shown_limit(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.limit:g}"


# (figure, against which policy) -> minimum ratio.
_OVERHEAD_BOUND_LOADED = {
    ("throughput", "sequential"): 1.3,
    ("throughput", "static"): 1.03,
    ("p50_s", "sequential"): 3,
    ("p95_s", "sequential"): 2,
    ("p95_s", "static"): 1.5,
    ("short_p95_s", "sequential"): 4,
    ("short_p95_s", "static"): 4,
}
_OVERHEAD_BOUND_LIGHT = {("p95_s", "sequential"): 1.3, ("short_p95_s", "sequential"): 4}
_SATURATED = {
    ("throughput", "sequential"): 1.0,
    ("p95_s", "sequential"): 0.95,
    ("short_p95_s", "sequential"): 2,
}
_RATIOS = {
    (OVERHEAD_BOUND, 1.5): _OVERHEAD_BOUND_LOADED,
    (OVERHEAD_BOUND, 0.7): _OVERHEAD_BOUND_LIGHT,
    (SATURATED, 1.5): _SATURATED,
}
_NAMES = {
    "throughput": "throughput",
    "p50_s": "p50 latency",
    "p95_s": "p95 latency",
    "short_p95_s": "p95 of short jobs",
}
GUIDED_ALONE, UNGUIDED_ALONE = 1.02, 1.08
INVARIANCE_COST = 1.03


def trace_gates(runs: Sequence[Run]) -> Iterator[Gate]:
    """The gates that these runs measure, all with mixed guidance."""
    for (model, load), limits in _RATIOS.items():
        matching = [run for run in runs if run.experiment == (model, "mixed", load)]
        if not matching:
            continue
        for (figure, against), limit in limits.items():
            ratio = getattr(median_ratio(matching, "step", against), figure)
            yield Gate(f"{model}, load {load:g}: {_NAMES[figure]} against {against}", ratio, limit)
    loaded = [run for run in runs if run.experiment == (OVERHEAD_BOUND, "mixed", 1.5)]
    if any(run.policy == "step-fast" for run in loaded):
        cost = median_ratio(loaded, "step-fast", "step").throughput
        yield Gate(
            f"{OVERHEAD_BOUND}, load 1.5: throughput without batch invariance over throughput with it",
            cost,
            INVARIANCE_COST,
            at_most=True,
        )


def alone_gates(model: str, guided: float, unguided: float) -> Iterator[Gate]:
    """CPU time of a single request divided by that of a diffusers call."""
    yield Gate(
        f"{model}: one request with guidance alone, CPU time over diffusers'",
        guided,
        GUIDED_ALONE,
        at_most=True,
    )
    yield Gate(
        f"{model}: one request without guidance alone, CPU time over diffusers'",
        unguided,
        UNGUIDED_ALONE,
        at_most=True,
    )


def bytes_gate(model: str, equal: int, total: int) -> Gate:
    return Gate(f"{model}: images of the trace with the same bytes when generated alone", equal / total, 1.0)
