"""The requests of a day: a daily curve, bursts, and a mix of models and steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scripts.simulate_fleet.costs import Traffic

_MINUTE_S = 60
_BURST_MINUTES = (2, 10)


@dataclass(frozen=True)
class Day:
    """How many requests come when.

    Attributes:
        rate: mean requests per second of the day, without bursts.
        peak: the busiest time over the mean, at `peak_hour`; the quietest is as far below the mean.
        bursts: per day; each multiplies the rate by `burst_factor` for 2 to 10 minutes.
        from_hour, hours: the part of the day to simulate.
    """

    rate: float
    peak: float = 1.6
    peak_hour: float = 18.0
    bursts: float = 12.0
    burst_factor: float = 2.0
    from_hour: float = 0.0
    hours: float = 24.0


@dataclass(frozen=True)
class Arrivals:
    """Requests in order of arrival: seconds from the start, index of the model, and steps."""

    at_s: NDArray[np.float64]
    model: NDArray[np.int64]
    steps: NDArray[np.int64]


def make_arrivals(day: Day, traffic: Traffic, seed: int) -> Arrivals:
    """Poisson arrivals, whose rate is constant within a minute."""
    rng = np.random.default_rng(seed)
    minutes = round(day.hours * 60)
    hour = day.from_hour + np.arange(minutes) / 60
    rate = day.rate * (1 + (day.peak - 1) * np.cos((hour - day.peak_hour) * 2 * np.pi / 24))
    for _ in range(rng.poisson(day.bursts * day.hours / 24)):
        start = int(rng.integers(0, minutes))
        rate[start : start + int(rng.integers(*_BURST_MINUTES, endpoint=True))] *= day.burst_factor
    counts = rng.poisson(rate * _MINUTE_S)
    starts = np.repeat(np.arange(minutes) * _MINUTE_S, counts)
    at_s = np.sort(starts + rng.uniform(0, _MINUTE_S, starts.size))
    shares = np.array([model.share for model in traffic.models.values()])
    model = rng.choice(len(shares), at_s.size, p=shares / shares.sum())
    steps = np.zeros(at_s.size, np.int64)
    for index, spec in enumerate(traffic.models.values()):
        weights = np.array(list(spec.steps.values()))
        of_model = model == index
        steps[of_model] = rng.choice(list(spec.steps), int(of_model.sum()), p=weights / weights.sum())
    return Arrivals(at_s, model, steps)
