"""Response times of `/health`, corrected for the load of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

# The promised 99th percentile of /health's response times, also while images are generated and the model
# loads. An idle machine needs a few milliseconds.
PROMISED_P99_S = 0.1
PAUSE_S = 0.01
ATTEMPTS = 6


@dataclass
class HealthLatency:
    """Response times of `/health`, and by how much this process overslept before each request."""

    response_times_s: list[float] = field(default_factory=list)
    oversleeps_s: list[float] = field(default_factory=list)

    def request_health(self, client: httpx.Client) -> Any:
        """Sleep, then return the body of /health."""
        sleep_start = time.perf_counter()
        time.sleep(PAUSE_S)
        started = time.perf_counter()
        health = client.get("/health").json()
        self.response_times_s.append(time.perf_counter() - started)
        self.oversleeps_s.append(started - sleep_start - PAUSE_S)
        return health

    @property
    def is_prompt(self) -> bool:
        """On a busy machine the server and this process may each wait for a core, as long as this process did
        after its sleeps.
        """
        return p99(self.response_times_s) < PROMISED_P99_S + 2 * p99(self.oversleeps_s)

    def __str__(self) -> str:
        return f"p99 {p99(self.response_times_s):.3f} s, overslept by {p99(self.oversleeps_s):.3f} s"


def assert_prompt(attempt: Callable[[], HealthLatency]) -> None:
    """One of six attempts must be prompt: a blocking server fails all of them, a busy machine does not."""
    failures: list[str] = []
    while len(failures) < ATTEMPTS:
        latency = attempt()
        if latency.is_prompt:
            return
        failures.append(str(latency))
    raise AssertionError("; ".join(failures))


def p99(seconds: list[float]) -> float:
    return sorted(seconds)[int(len(seconds) * 0.99)]
