"""Shapes: what the engine has learned of each group of images, its verdict and its cost curve."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from hypergen.config import EngineSettings
from hypergen.engine.batching import CostCurve, GroupKey, group_key
from hypergen.engine.determinism import DeterminismRule, Probe
from hypergen.generation import Verdict
from hypergen.models.family import Family
from hypergen.trajectory import Trajectory

logger = logging.getLogger(__name__)


class Shapes:
    """Probes shapes as they first appear, and remembers the latest.

    Keys are those of images that share their passes: what must run alone costs what its shape costs.
    """

    _KEPT = 256

    def __init__(
        self, family: Family, settings: EngineSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._family = family
        self._strict = settings.determinism == "strict"
        self._max_rows = 2 * settings.max_batch_size
        self._rule = DeterminismRule(family, enabled=self._strict, max_rows=self._max_rows, clock=clock)
        self._probes: dict[GroupKey, Probe] = {}
        self._probing: set[GroupKey] = set()
        self.costs: dict[GroupKey, CostCurve] = {}

    def learn(self, trajectory: Trajectory) -> Iterator[None]:
        """Probe the shape of a trajectory if it is new; an item for each forward pass, so that other images
        can advance between them.
        """
        key = group_key(trajectory).shared
        while key in self._probing:  # for another request
            yield
        if key in self._probes:
            return
        request = trajectory.request
        size = self._family.drawn_size(request.width, request.height)
        probe = self._rule.probe(*size, key.prompt_length)
        self._probing.add(key)
        try:
            yield from probe.passes
        finally:
            self._probing.discard(key)
        seconds = ", ".join(f"{rows}: {seconds:.3f}" for rows, seconds in probe.seconds.items())
        logger.info(
            "Probed %dx%d: %s, %d layers repaired, seconds of a pass by rows {%s}",
            *size,
            probe.verdict,
            probe.repaired,
            seconds,
        )
        if self._strict and probe.verdict == "exact":
            self.costs[key] = CostCurve(max(probe.seconds), frozenset(probe.seconds), dict(probe.seconds))
        else:
            self.costs[key] = CostCurve(self._max_rows, None, dict(probe.seconds))
        self._probes[key] = probe

    def forget_old(self, needed: set[GroupKey]) -> None:
        """Keep the latest shapes and those that are needed."""
        for key in [key for key in self._probes if key not in needed][
            : max(0, len(self._probes) - self._KEPT)
        ]:
            del self._probes[key], self.costs[key]

    def must_run_alone(self, trajectory: Trajectory) -> bool:
        """Whether neighbours would change the bits of an image whose seed was asked for."""
        verdict = self._probes[group_key(trajectory).shared].verdict
        return self._strict and trajectory.request.seed_given and verdict == "close"

    def verdicts(self) -> dict[str, Verdict]:
        """For each drawn size, "512x512": the verdict over all lengths of prompts."""
        verdicts: dict[str, Verdict] = {}
        for probe in list(self._probes.values()):
            size = f"{probe.width}x{probe.height}"
            if verdicts.get(size) != "close":
                verdicts[size] = probe.verdict
        return verdicts
