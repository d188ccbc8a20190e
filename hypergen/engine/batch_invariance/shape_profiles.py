"""ShapeProfiles: what the engine has learned of each group of images, its verdict and its cost curve."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping

from hypergen.config import EngineSettings
from hypergen.denoising.denoising_state import DenoisingState
from hypergen.engine.batch_invariance.probe import BatchInvariance, Probe
from hypergen.engine.scheduler import BatchKey, CostCurve, batch_key
from hypergen.events import Verdict
from hypergen.models.family import Family

logger = logging.getLogger(__name__)


class ShapeProfiles:
    """Probes shapes as they first appear, and remembers the latest.

    A probe is made in two parts: what a request needs before it can be drawn, and larger passes, which wait
    until the engine has more images than it may draw at once, or nothing else to do. The latter only where
    they are short, because a request that comes in the middle of a pass waits for its end.

    Keys are those of images that share their passes: what must run alone costs what its shape costs.
    """

    _KEPT = 256
    # A probe keeps rows as large as the largest batch, on the device.
    _MOST_UNFINISHED = 8
    # One guided image. A request need not wait until larger passes are proved.
    _ENOUGH_ROWS = 2
    _LONGEST_IDLE_PASS_S = 0.5
    _END = object()

    def __init__(
        self, family: Family, settings: EngineSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._strict = settings.determinism == "strict"
        self._max_rows = 2 * settings.max_batch_size
        self._compiled = settings.compile != "off"
        self._rule = BatchInvariance(
            family,
            enabled=self._strict,
            replaces=not self._compiled,
            max_rows=self._max_rows,
            clock=clock,
        )
        self._probes: dict[BatchKey, Probe] = {}
        self._probing: set[BatchKey] = set()
        # In the order in which they were begun; only these probes keep tensors.
        self._unfinished: dict[BatchKey, None] = {}
        self._paused: set[BatchKey] = set()
        self._joining: Counter[BatchKey] = Counter()
        self.costs: dict[BatchKey, CostCurve] = {}

    def probe_minimum(self, state: DenoisingState) -> Iterator[None]:
        """Probe the shapes of a state's stages if they are new, far enough to draw; an item for each
        forward pass, so that other images can advance between them. Where nothing is drawn there is nothing
        to learn.
        """
        if state.skip_denoising:
            return
        stages = list(state.with_each_denoiser())
        needed = [batch_key(stage).shared for stage in stages]
        self._joining.update(needed)
        try:
            for stage in stages:
                yield from self._probe_minimum(stage)
        finally:
            self._joining.subtract(needed)

    def _probe_minimum(self, state: DenoisingState) -> Iterator[None]:
        key = batch_key(state).shared
        while key in self._probing:  # for another request
            yield
        if key in self._paused:
            self._paused.discard(key)
            self._rule.restart(self._probes[key], state)
            self._may_go_on(key)
        if key in self._probes:
            return
        probe = self._rule.probe(state)
        self._probing.add(key)
        try:
            for _ in probe.passes:
                if max(probe.seconds, default=0) >= self._ENOUGH_ROWS:
                    break
                yield
        finally:
            self._probing.discard(key)
        self._probes[key] = probe
        self._may_go_on(key)
        self._read(key)

    def _may_go_on(self, key: BatchKey) -> None:
        """Let a probe try larger passes later; the oldest of too many pauses until its shape is asked for."""
        self._unfinished[key] = None
        if len(self._unfinished) > self._MOST_UNFINISHED:
            oldest = next(iter(self._unfinished))
            self._end(oldest)
            self._paused.add(oldest)

    def _end(self, key: BatchKey) -> None:
        """Probe no further, and give the tensors back."""
        self._unfinished.pop(key, None)
        self._paused.discard(key)
        self._probes[key].passes = iter(())

    def next_pending_probe(self, active: Collection[DenoisingState]) -> BatchKey | None:
        """A shape whose probe has more rows to try, and that it is worth to try them: nothing else is to be
        done, or more rows wait than are proved.
        """
        rows: Counter[BatchKey] = Counter()
        for state in active:
            rows[batch_key(state).shared] += state.rows
        worth = (
            key
            for key in self._unfinished
            if (rows[key] > max(self._probes[key].seconds) if active else self._next_is_short(key))
        )
        return next(worth, None)

    def _next_is_short(self, key: BatchKey) -> bool:
        if self._compiled:  # what takes minutes is better done before it is needed
            return True
        seconds = self._probes[key].seconds
        return 2 * seconds[max(seconds)] <= self._LONGEST_IDLE_PASS_S  # rows are doubled at most

    def finish(self) -> None:
        """Make every probe whole, however long its passes are: before something is measured."""
        for key in list(self._unfinished):
            while key in self._unfinished:
                self.probe_next(key)

    def probe_next(self, key: BatchKey) -> None:
        """One more forward pass of an unfinished probe."""
        try:
            if next(self._probes[key].passes, self._END) is not self._END:
                self._read(key)
                return
        except Exception:  # what is proved so far still serves
            logger.exception("A probe failed and is given up.")
        self._finish(key)

    def limit_rows(self, key: BatchKey, rows: int) -> None:
        """So many rows do not fit into memory: try no more, and make smaller passes."""
        self._end(key)
        self.costs[key].max_rows = max(2, rows // 2)

    def _read(self, key: BatchKey) -> None:
        """Take over what a probe has found so far."""
        probe = self._probes[key]
        # Any other number of rows would have to be compiled first, or has not been proved.
        tried_only = self._compiled or (self._strict and probe.verdict == "exact")
        if key not in self.costs:
            self.costs[key] = CostCurve(self._max_rows)
        curve = self.costs[key]
        curve.max_rows = max(probe.seconds) if tried_only else self._max_rows
        curve.row_counts = frozenset(probe.seconds) if tried_only else None
        curve.seconds = {**probe.seconds, **curve.seconds}

    def _finish(self, key: BatchKey) -> None:
        self._end(key)
        self._read(key)
        probe = self._probes[key]
        seconds = ", ".join(f"{rows}: {seconds:.3f}" for rows, seconds in probe.seconds.items())
        logger.info(
            "Probed %dx%d: %s, %d layers replaced, seconds of a pass by rows {%s}",
            probe.width,
            probe.height,
            probe.verdict,
            probe.replaced,
            seconds,
        )

    def forget_old(self, needed: set[BatchKey]) -> None:
        """Keep the latest shapes, those that are needed and those of requests that are joining."""
        old = [key for key in self._probes if key not in needed and not self._joining[key]]
        for key in old[: max(0, len(self._probes) - self._KEPT)]:
            self._end(key)
            del self._probes[key], self.costs[key]
        self._joining = +self._joining

    def must_run_alone(self, state: DenoisingState) -> bool:
        """Whether neighbours would change the bits of an image whose seed was asked for."""
        if state.skip_denoising:
            return False
        verdict = self._probes[batch_key(state).shared].verdict
        return self._strict and state.request.seed_given and verdict == "close"

    @property
    def probes(self) -> Mapping[BatchKey, Probe]:
        """What was found for each shape, finished or not."""
        return self._probes

    def verdicts(self) -> dict[str, Verdict]:
        """For each drawn size, "512x512": the verdict over all lengths of prompts."""
        verdicts: dict[str, Verdict] = {}
        for probe in list(self._probes.values()):
            size = f"{probe.width}x{probe.height}"
            if verdicts.get(size) != "close":
                verdicts[size] = probe.verdict
        return verdicts
