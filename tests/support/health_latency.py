"""How soon `/health` answers, told apart from how busy the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

# The promise of /health, in seconds: 99 of 100 answers within this, also while pictures are drawn and while
# the model loads. A quiet machine needs a few milliseconds.
PROMISED_P99_S = 0.1
PAUSE_S = 0.01
ATTEMPTS = 6


@dataclass
class Probe:
    """How long `/health` took to answer, and how much too late this process woke from its sleeps."""

    answers_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)

    def look(self, client: httpx.Client) -> Any:
        """What /health says, after a short sleep."""
        asleep = time.perf_counter()
        time.sleep(PAUSE_S)
        started = time.perf_counter()
        health = client.get("/health").json()
        self.answers_s.append(time.perf_counter() - started)
        self.late_s.append(started - asleep - PAUSE_S)
        return health

    @property
    def is_prompt(self) -> bool:
        """A busy machine lets processes wait for a core: the server before its answer and this one after it
        may each wait as long as this one did after its sleeps.
        """
        return p99(self.answers_s) < PROMISED_P99_S + 2 * p99(self.late_s)

    def __str__(self) -> str:
        return f"p99 {p99(self.answers_s):.3f} s, own sleeps {p99(self.late_s):.3f} s late"


def assert_prompt(attempt: Callable[[], Probe]) -> None:
    """One attempt of six must be prompt: a server that blocks does so in each, a busy machine does not."""
    slow: list[str] = []
    while len(slow) < ATTEMPTS:
        probe = attempt()
        if probe.is_prompt:
            return
        slow.append(str(probe))
    raise AssertionError("; ".join(slow))


def p99(seconds: list[float]) -> float:
    return sorted(seconds)[int(len(seconds) * 0.99)]
