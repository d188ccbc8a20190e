"""ShapeProfiles: the probe and the cost curve of each batch key."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext

from hypergen.config import EngineSettings
from hypergen.denoising.denoising_state import DenoisingState
from hypergen.engine.batch_invariance.bucket_store import BucketStore
from hypergen.engine.batch_invariance.probe import BatchInvariance, Probe
from hypergen.engine.compiled_forward import CompiledForward
from hypergen.engine.forward_graphs import uses_graphs
from hypergen.engine.scheduler import BatchKey, CostCurve, batch_key
from hypergen.engine.warmup import rows_per_image
from hypergen.events import Verdict
from hypergen.models.family import Family
from hypergen.models.memory import LeaveRoom

logger = logging.getLogger(__name__)


class ShapeProfiles:
    """Probes new shapes and keeps the results of the latest ones.

    A probe has two parts. A request needs the first part before its first step. The second part tries larger
    batches. It runs when more images wait than the probed batch sizes can hold, or when the engine is idle;
    then only if its forward passes are short, because a new request waits for the end of one.

    Keys are `BatchKey.shared`: an image that must run alone has the costs of its shape.
    """

    _MAX_SHAPES = 256
    # An unfinished probe keeps the inputs of the largest batch on the device.
    _MAX_UNFINISHED = 8
    _MAX_IDLE_FORWARD_S = 0.5
    _END = object()

    def __init__(
        self,
        family: Family,
        settings: EngineSettings,
        clock: Callable[[], float] = time.monotonic,
        buckets: BucketStore | None = None,
        compiled: CompiledForward | None = None,
        leave_room: LeaveRoom = nullcontext,
    ) -> None:
        self._strict = settings.determinism == "strict"
        self._max_rows = 2 * settings.max_batch_size
        self._compiles = compiled is not None
        self._uncompiled_sizes: set[str] = set()  # that were logged
        self._batch_invariance = BatchInvariance(
            family,
            enabled=self._strict,
            compiled=compiled,
            graphs=uses_graphs(family, settings),
            max_rows=self._max_rows,
            rows_per_image=rows_per_image(family),
            buckets=buckets,
            clock=clock,
            leave_room=leave_room,
        )
        self._probes: dict[BatchKey, Probe] = {}
        self._probing: set[BatchKey] = set()
        # In order of their start; only these probes keep tensors.
        self._unfinished: dict[BatchKey, None] = {}
        self._paused: set[BatchKey] = set()
        self._preparing: Counter[BatchKey] = Counter()  # the keys of requests in `probe_minimum`
        self.costs: dict[BatchKey, CostCurve] = {}

    def compile(self, state: DenoisingState) -> None:
        """Compile the forward pass of an image's shape; takes minutes.

        Raises:
            ModelError: torch.compile failed.
        """
        self._batch_invariance.compiled_shapes.add(batch_key(state).shared)
        deque(self.probe_minimum(state), maxlen=0)

    def is_compiled(self, state: DenoisingState) -> bool:
        return batch_key(state).shared in self._batch_invariance.compiled_shapes

    def probe_minimum(self, state: DenoisingState) -> Iterator[None]:
        """Run the first part of the probe for each denoiser of an image, if its shape is new.

        Yields after each forward pass, so that other images can advance in between. Does nothing for an image
        without denoising.
        """
        if state.skip_denoising:
            return
        variants = list(state.with_each_denoiser())
        keys = [batch_key(variant).shared for variant in variants]
        self._preparing.update(keys)
        try:
            for variant in variants:
                yield from self._probe_minimum(variant)
        finally:
            self._preparing.subtract(keys)

    def _probe_minimum(self, state: DenoisingState) -> Iterator[None]:
        key = batch_key(state).shared
        while key in self._probing:  # for another request
            yield
        if key in self._paused:
            self._paused.discard(key)
            self._batch_invariance.restart(self._probes[key], state)
            self._add_unfinished(key)
        if key in self._probes:
            return
        probe = self._batch_invariance.make_probe(state)
        if self._compiles and not self.is_compiled(state):
            self._log_uncompiled(f"{probe.width}x{probe.height}")
        self._probing.add(key)
        try:
            for _ in probe.forwards:
                if probe.usable:
                    break
                yield
        except BaseException:  # also GeneratorExit, of a cancelled request
            probe.stop()
            raise
        finally:
            self._probing.discard(key)
        self._probes[key] = probe
        self._add_unfinished(key)
        self._update_costs(key)

    def _log_uncompiled(self, size: str) -> None:
        if size not in self._uncompiled_sizes:
            self._uncompiled_sizes.add(size)
            logger.info(
                "%s runs uncompiled: not in --compile-sizes, or with a long prompt, a LoRA or a ControlNet.",
                size,
            )

    def _add_unfinished(self, key: BatchKey) -> None:
        """Let a probe try larger batches later. The oldest of too many pauses until a request needs it."""
        self._unfinished[key] = None
        if len(self._unfinished) > self._MAX_UNFINISHED:
            self._pause(next(iter(self._unfinished)))

    def pause_probes(self) -> None:
        """Free the tensors of all probes; unfinished ones restart when a request needs them."""
        for key in list(self._unfinished):
            self._pause(key)

    def _pause(self, key: BatchKey) -> None:
        self._stop(key)
        self._paused.add(key)

    def _stop(self, key: BatchKey) -> None:
        """Stop a probe and free its tensors."""
        self._unfinished.pop(key, None)
        self._paused.discard(key)
        self._probes[key].stop()

    def next_pending_probe(self, running: Collection[DenoisingState]) -> BatchKey | None:
        """A shape whose unfinished probe should continue now.

        That is one with more running rows than its largest probed batch, or any if no image is running.
        """
        if not self._unfinished:
            return None
        rows: Counter[BatchKey] = Counter()
        for state in running:
            rows[batch_key(state).shared] += state.rows
        pending = (
            key
            for key in self._unfinished
            if (rows[key] > max(self._probes[key].seconds) if running else self._fits_idle_time(key))
        )
        return next(pending, None)

    def _fits_idle_time(self, key: BatchKey) -> bool:
        seconds = self._probes[key].seconds
        return 2 * seconds[max(seconds)] <= self._MAX_IDLE_FORWARD_S  # at most twice the rows

    def finish_probes(self) -> None:
        """Finish all probes, however long their forward passes are; for benchmarks and tests."""
        for key in list(self._unfinished):
            while key in self._unfinished:
                self.continue_probe(key)

    def continue_probe(self, key: BatchKey) -> None:
        """Run one more forward pass of an unfinished probe."""
        try:
            if next(self._probes[key].forwards, self._END) is not self._END:
                self._update_costs(key)
                return
        except Exception:  # Isolate the failure: the row counts that were probed so far remain usable.
            logger.exception("A probe failed and is not continued.")
        self._finish(key)

    def limit_rows(self, key: BatchKey, rows: int) -> None:
        """Use smaller batches for a shape and stop its probe, because this many rows do not fit in memory."""
        self._stop(key)
        curve = self.costs[key]
        if self._batch_invariance.has_bucket(key):
            bucket = self._batch_invariance.limit_bucket(key, rows // 2)
            logger.warning(
                "Out of memory with %d rows: this size now uses %d, with other last bits.", rows, bucket
            )
            curve.max_rows, curve.row_counts, curve.seconds = bucket, frozenset({bucket}), {}
            return
        curve.max_rows = max(2, rows // 2)
        if curve.row_counts is not None:
            curve.row_counts = frozenset(count for count in curve.row_counts if count <= curve.max_rows)

    def _update_costs(self, key: BatchKey) -> None:
        """Update the cost curve of a shape from its probe."""
        probe = self._probes[key]
        # Other row counts are not compiled, or not known to be bit-exact.
        compiled = key in self._batch_invariance.compiled_shapes
        probed_only = compiled or (self._strict and probe.verdict == "exact")
        if key not in self.costs:
            self.costs[key] = CostCurve(self._max_rows)
        curve = self.costs[key]
        curve.max_rows = max(probe.seconds) if probed_only else self._max_rows
        curve.row_counts = frozenset(probe.seconds) if probed_only else None
        curve.seconds = {**probe.seconds, **curve.seconds}

    def _finish(self, key: BatchKey) -> None:
        self._stop(key)
        self._update_costs(key)
        probe = self._probes[key]
        seconds = ", ".join(f"{rows}: {seconds:.3f}" for rows, seconds in probe.seconds.items())
        logger.info(
            "Probed %dx%d: %s, %d layers replaced, seconds of a forward pass by row count {%s}",
            probe.width,
            probe.height,
            probe.verdict,
            probe.replaced_layers,
            seconds,
        )

    @property
    def is_full(self) -> bool:
        return len(self._probes) > self._MAX_SHAPES

    def evict_oldest(self, needed: set[BatchKey]) -> None:
        """Evict the oldest shapes beyond the limit, except `needed` ones and those in `probe_minimum`."""
        evictable = [key for key in self._probes if key not in needed and not self._preparing[key]]
        for key in evictable[: max(0, len(self._probes) - self._MAX_SHAPES)]:
            self._stop(key)
            del self._probes[key], self.costs[key]
        self._preparing = +self._preparing

    def must_run_alone(self, state: DenoisingState) -> bool:
        """Whether other rows in the batch would change the bytes of an image whose request gave a seed."""
        if state.skip_denoising:
            return False
        verdict = self._probes[batch_key(state).shared].verdict
        return self._strict and state.request.seed_given and verdict == "close"

    @property
    def probes(self) -> Mapping[BatchKey, Probe]:
        """The probe of each shape, finished or not."""
        return self._probes

    def row_counts(self) -> dict[str, tuple[int, ...]]:
        """Generation size -> the row counts that its batches are padded to; without those that take any."""
        counts: dict[str, set[int]] = {}
        for key, probe in list(self._probes.items()):
            if (curve := self.costs.get(key)) is not None and curve.row_counts is not None:
                counts.setdefault(f"{probe.width}x{probe.height}", set()).update(curve.row_counts)
        return {size: tuple(sorted(found)) for size, found in counts.items()}

    def verdicts(self) -> dict[str, Verdict]:
        """Generation size, for example "512x512" -> its verdict over all prompt lengths."""
        verdicts: dict[str, Verdict] = {}
        for probe in list(self._probes.values()):
            size = f"{probe.width}x{probe.height}"
            if verdicts.get(size) != "close":
                verdicts[size] = probe.verdict
        return verdicts
