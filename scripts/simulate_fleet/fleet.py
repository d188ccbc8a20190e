"""The simulation: arrivals, ends of images, and the decisions of the autoscaler, in order of time."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from scripts.simulate_fleet.arrivals import Arrivals
from scripts.simulate_fleet.balancer import Balancer
from scripts.simulate_fleet.replica import Replica

_Kind = Literal["end", "ready", "scale"]


@dataclass(frozen=True)
class Fleet:
    """Replicas of one GPU each, and the rules of their autoscaler, like those of the Helm chart with KEDA.

    Attributes:
        target: unfinished requests per replica that the autoscaler aims at.
        interval_s: between two of its decisions.
        start_s: from the decision to a replica that serves: machine, image, model.
        cooldown_s: it removes replicas only if fewer were enough for this long.
        max_waiting: waiting requests of a replica; beyond it, a request gets 429.
    """

    min_replicas: int
    max_replicas: int
    target: float = 6.0
    interval_s: float = 15.0
    start_s: float = 180.0
    cooldown_s: float = 600.0
    max_batch_size: int = 8
    max_waiting: int = 100


@dataclass
class Outcome:
    """What became of the requests. Times of rejected ones are NaN.

    Attributes:
        wait_s, latency_s: from the arrival to the start, and to the end.
        most_replicas: at once, with those that start.
        busy_s: seconds in which GPUs had images, in total.
        images_per_forward: mean batch size.
    """

    wait_s: NDArray[np.float64]
    latency_s: NDArray[np.float64]
    gpu_s: float = 0.0
    busy_s: float = 0.0
    most_replicas: int = 0
    images_per_forward: float = 0.0
    most_unfinished: int = 0

    @property
    def served(self) -> int:
        return int(np.isfinite(self.latency_s).sum())

    @property
    def rejected(self) -> int:
        return self.latency_s.size - self.served


def simulate(
    arrivals: Arrivals,
    seconds: Sequence[Sequence[float]],
    extra_steps: Sequence[float],
    fleet: Fleet,
    duration_s: float,
) -> Outcome:
    """Run all requests to their end.

    Args:
        seconds, extra_steps: of each model, see `Model`.
        duration_s: of the traffic; replicas are paid for at least as long.
    """
    return _Simulation(arrivals, seconds, extra_steps, fleet).run(duration_s)


class _Simulation:
    def __init__(
        self,
        arrivals: Arrivals,
        seconds: Sequence[Sequence[float]],
        extra_steps: Sequence[float],
        fleet: Fleet,
    ) -> None:
        self._fleet = fleet
        self._seconds = seconds
        self._at_s: list[float] = arrivals.at_s.tolist()
        self._models: list[int] = arrivals.model.tolist()
        steps = arrivals.steps + np.asarray(extra_steps)[arrivals.model]
        self._steps: list[float] = steps.tolist()
        nothing = np.full(arrivals.at_s.size, math.nan)
        self._outcome = Outcome(nothing, nothing.copy())
        self._balancer = Balancer()
        self._starting: dict[Replica, None] = {}
        self._since: dict[Replica, float] = {}  # paid replicas -> since when
        self._unfinished = 0
        self._wanted: deque[tuple[float, int]] = deque()  # decisions within the cooldown
        self._events: list[tuple[float, int, _Kind, Replica | None, int]] = []
        self._counter = 0
        self._forwards = self._image_steps = 0.0

    def run(self, duration_s: float) -> Outcome:
        for _ in range(self._fleet.min_replicas):
            self._serve(self._launch(0.0))
        if self._fleet.max_replicas > self._fleet.min_replicas:
            self._schedule(self._fleet.interval_s, "scale")
        now = 0.0
        for number, at_s in enumerate(self._at_s):
            while self._events and self._events[0][0] <= at_s:
                self._next_event()
            self._arrive(number, at_s)
            now = at_s
        while self._unfinished:
            now = self._next_event()
        for replica in list(self._since):
            self._leave(replica, max(now, duration_s))
        outcome = self._outcome
        outcome.images_per_forward = self._image_steps / self._forwards if self._forwards else 0.0
        return outcome

    def _arrive(self, number: int, now: float) -> None:
        replica = self._balancer.choose()
        full = self._fleet.max_batch_size + self._fleet.max_waiting
        if replica is None or replica.connections >= full:
            return
        self._unfinished += 1
        self._outcome.most_unfinished = max(self._outcome.most_unfinished, self._unfinished)
        if replica.add(now, (number, self._models[number], self._steps[number])):
            self._outcome.wait_s[number] = 0.0
            self._schedule(replica.ends_at, "end", replica)
        self._balancer.update(replica)

    def _next_event(self) -> float:
        """Handle the next event; returns its time."""
        now, _, kind, replica, version = heapq.heappop(self._events)
        if replica is None:
            self._scale(now)
        elif kind == "ready":
            if replica in self._starting:  # else it was removed meanwhile
                self._serve(replica)
        elif version == replica.version:  # else another request has changed its next end
            self._end(replica, now)
        return now

    def _end(self, replica: Replica, now: float) -> None:
        number, started = replica.finish(now)
        self._unfinished -= 1
        self._outcome.latency_s[number] = now - self._at_s[number]
        if started is not None:
            self._outcome.wait_s[started] = now - self._at_s[started]
        if replica.connections:
            self._schedule(replica.ends_at, "end", replica)
        if replica in self._balancer:
            self._balancer.update(replica)
        elif not replica.connections:  # it has drained
            self._leave(replica, now)

    def _scale(self, now: float) -> None:
        fleet, current = self._fleet, len(self._balancer) + len(self._starting)
        wanted = math.ceil(self._unfinished / fleet.target)
        wanted = min(max(wanted, fleet.min_replicas), fleet.max_replicas)
        self._wanted.append((now, wanted))
        while self._wanted[0][0] < now - fleet.cooldown_s:
            self._wanted.popleft()
        for _ in range(wanted - current):
            self._schedule(now + fleet.start_s, "ready", self._launch(now))
        for _ in range(current - max(most for _, most in self._wanted)):
            self._remove_one(now)
        self._schedule(now + fleet.interval_s, "scale")

    def _remove_one(self, now: float) -> None:
        """Remove a replica that starts, else the one with the fewest requests, once these have ended."""
        if self._starting:
            replica, _ = self._starting.popitem()
        else:
            replica = self._balancer.choose()
            assert replica is not None
            self._balancer.remove(replica)
        if not replica.connections:
            self._leave(replica, now)

    def _launch(self, now: float) -> Replica:
        replica = Replica(self._seconds, self._fleet.max_batch_size)
        self._starting[replica] = None
        self._since[replica] = now
        self._outcome.most_replicas = max(self._outcome.most_replicas, len(self._since))
        return replica

    def _serve(self, replica: Replica) -> None:
        del self._starting[replica]
        self._balancer.update(replica)

    def _leave(self, replica: Replica, now: float) -> None:
        self._outcome.gpu_s += now - self._since.pop(replica)
        self._outcome.busy_s += replica.busy_s
        self._forwards += replica.forwards
        self._image_steps += replica.image_steps

    def _schedule(self, at_s: float, kind: _Kind, replica: Replica | None = None) -> None:
        self._counter += 1
        version = 0 if replica is None else replica.version
        heapq.heappush(self._events, (at_s, self._counter, kind, replica, version))
