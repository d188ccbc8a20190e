"""The results of a run, and their medians over runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from scripts.bench.policies import FinishedJob


@dataclass(frozen=True)
class Figures:
    """Throughput and latency of one policy for one job list.

    Attributes:
        throughput: jobs per second, from the first arrival to the last image.
        p50_s, p95_s: latency in seconds from arrival to finished file.
        short_p95_s: the same for jobs with at most 8 steps.
    """

    throughput: float
    p50_s: float
    p95_s: float
    short_p95_s: float

    def over(self, other: Figures) -> Figures:
        """How many times better than another policy: higher throughput, lower latency."""
        return Figures(
            self.throughput / other.throughput,
            other.p50_s / self.p50_s,
            other.p95_s / self.p95_s,
            other.short_p95_s / self.short_p95_s,
        )


@dataclass(frozen=True)
class Run:
    """One policy, one job list, one load."""

    model: str
    guidance: str
    load: float
    seed: int
    policy: str
    figures: Figures
    # Mean batch size.
    mean_batch_size: float

    @property
    def experiment(self) -> tuple[str, str, float]:
        """The key that runs of different seeds and policies share."""
        return self.model, self.guidance, self.load


def figures_of(finished: Sequence[FinishedJob]) -> Figures:
    latencies = [entry.latency_s for entry in finished]
    short = [entry.latency_s for entry in finished if entry.job.short] or latencies
    first, last = min(entry.queued_at for entry in finished), max(entry.finished_at for entry in finished)
    return Figures(
        len(finished) / (last - first),
        _percentile(latencies, 50),
        _percentile(latencies, 95),
        _percentile(short, 95),
    )


def _percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent, method="inverted_cdf"))


def median(figures: Iterable[Figures]) -> Figures:
    """The median of each field."""
    columns = [asdict(entry) for entry in figures]
    return Figures(**{name: statistics.median(column[name] for column in columns) for name in columns[0]})


def median_of(runs: Iterable[Run], policy: str) -> Figures:
    return median(run.figures for run in runs if run.policy == policy)


def median_ratio(runs: Sequence[Run], policy: str, against: str) -> Figures:
    """How many times better a policy is: the ratio per seed, then the median over the seeds."""
    others = {run.seed: run.figures for run in runs if run.policy == against}
    return median(run.figures.over(others[run.seed]) for run in runs if run.policy == policy)
