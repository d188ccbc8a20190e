"""Batch invariance of the denoiser, and the probe that tests it.

A kernel may add numbers in another order for another batch size. Then the last bits of an image depend on the
other rows of its batch.

On a CPU, the layers that are known to do so are replaced (`layers.py`), and the same rows must be bit-exact
in batches of 1, 2, 3, 4, 6 ... rows, at every position. Row counts that are not bit-exact are not used.

The kernels of an accelerator change with the row count, and no layer can prevent it. There all batches of a
shape have one row count, its bucket: the largest that costs little more than one image alone. Smaller batches
are padded to it. Compiled shapes have a bucket on every device, because each row count takes minutes to
compile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Hashable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from operator import itemgetter

import torch
from torch import Tensor, nn

from hypergen.denoising.denoising_state import DenoisingState
from hypergen.engine.batch_invariance.bucket_store import BucketStore
from hypergen.engine.batch_invariance.layers import make_layers_invariant, make_linears_invariant
from hypergen.engine.compiled_forward import CompiledForward
from hypergen.engine.forward_graphs import ForwardGraphs
from hypergen.engine.request_errors import is_out_of_memory
from hypergen.engine.scheduler import BatchKey, batch_key
from hypergen.events import Verdict
from hypergen.models.cfg import ForwardInputs, map_rows, random_rows
from hypergen.models.family import Family
from hypergen.models.memory import LeaveRoom

_ROW_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_BUCKETS = (1, 2, 4, 8, 16)
# A bucket may cost so much more than one image alone, which then pays for padding.
_MAX_BUCKET_COST = 1.25
# Larger batches than those that make rows so much cheaper, for each doubling, are not tried.
_MIN_SPEEDUP = 1.05


@dataclass
class Probe:
    """The probe of one generation size and prompt length.

    Attributes:
        forwards: runs the probe, one forward pass per item; the other attributes are final at its end.
        verdict: "exact" if the rows of all batches in `seconds` are bit-exact. In strict mode only these
            row counts are used, so the verdict holds for every image.
        seconds: row count -> seconds of a forward pass, the first points of the cost curve.
        differing: row counts whose rows are not bit-exact.
        replaced_layers: number of layers that are replaced for this size.
        usable: whether images can be generated before the end of the probe.
    """

    width: int
    height: int
    forwards: Iterator[None] = field(default_factory=lambda: iter(()), repr=False)
    verdict: Verdict = "exact"
    seconds: dict[int, float] = field(default_factory=dict)
    differing: set[int] = field(default_factory=set)
    replaced_layers: int = 0
    usable: bool = False

    def stop(self) -> None:
        """Free the tensors of the forward passes at once: the generator and the probe refer to each other."""
        self.forwards = iter(())


class BatchInvariance:
    """Replaces layers of one denoiser and probes each generation size before its first image.

    Args:
        enabled: False probes and reports, but replaces no layer (`--determinism fast`).
        compiled: the family's `forward`, if shapes are compiled.
        graphs: whether forward passes run as CUDA graphs.
        max_rows: rows of the largest batch.
        rows_per_image: of an image with the model's default parameters: 2 with guidance.
        buckets: chosen earlier.
        budget_s: a probe tries no more row counts after this many seconds, for large models on slow devices.
        clock: seconds, for the first points of the cost curve.
        leave_room: see `PostProcessor`; a batch that leaves too little counts as out of memory.

    Attributes:
        compiled_shapes: the shapes to compile.
    """

    def __init__(
        self,
        family: Family,
        *,
        enabled: bool,
        compiled: CompiledForward | None = None,
        graphs: bool = False,
        max_rows: int,
        rows_per_image: int = 2,
        buckets: BucketStore | None = None,
        budget_s: float = 20,
        clock: Callable[[], float] = time.monotonic,
        leave_room: LeaveRoom = nullcontext,
    ) -> None:
        self._family = family
        self._enabled = enabled
        self._compiled = compiled
        self._graphs = graphs
        self.compiled_shapes: set[BatchKey] = set()
        self._max_rows = max_rows
        self._budget_s = budget_s
        self._clock = clock
        self._leave_room = leave_room
        self._rows_per_image = rows_per_image
        self._buckets = buckets or BucketStore(None, {})
        self._on_cpu = family.device.type == "cpu"
        self._replace_layers = enabled and self._on_cpu
        self._networks = nn.ModuleList([family.denoiser, *family.controlnets.values()])
        if self._replace_layers:
            make_linears_invariant(self._networks)

    def make_probe(self, state: DenoisingState) -> Probe:
        """A new probe for the generation size and prompt length of an image; nothing is run yet."""
        request = state.request
        probe = Probe(*self._family.generation_size(request.width, request.height))
        self.restart(probe, state)
        return probe

    def restart(self, probe: Probe, state: DenoisingState) -> None:
        """Restart a stopped probe with an image of the same shape."""
        choose_bucket = not self._on_cpu or batch_key(state).shared in self.compiled_shapes
        run = self._choose_bucket if choose_bucket else self._compare_row_counts
        probe.forwards = run(probe, state)

    def has_bucket(self, key: BatchKey) -> bool:
        """Whether all batches of a shape have one row count."""
        return key in self.compiled_shapes or (self._enabled and not self._on_cpu)

    def limit_bucket(self, key: BatchKey, max_rows: int) -> int:
        """The bucket of a shape from now on, after the larger one was out of memory; it runs eagerly."""
        self.compiled_shapes.discard(key)
        bucket = max((count for count in _BUCKETS if count <= max_rows), default=1)
        return self._buckets.put(str(key), bucket, replace=True)

    def _choose_bucket(self, probe: Probe, state: DenoisingState) -> Iterator[None]:
        """Choose the row count of all batches of a shape, or in fast mode measure the row counts.

        Clocks choose once: the bucket is kept in a file. Forward passes are measured before the shape is
        compiled, and as CUDA graphs if they run so: the third run is the first replay. Eager ones of a small
        model cost the launches, which are the same for all row counts.
        """
        shape = batch_key(state).shared
        has_bucket = self.has_bucket(shape)
        generator = torch.Generator("cpu").manual_seed(0)
        own = self._rows_per_image
        largest = max(own, self._max_rows)
        inputs, batch_key_extra = random_rows(state, largest, generator), state.batch_key_extra
        chosen = self._buckets.get(str(shape)) if has_bucket else None
        counts = [count for count in _BUCKETS if own <= count <= (chosen or largest)]
        seconds: dict[int, float] = {}
        expected: Tensor | None = None  # the output of the last row count
        for count in [chosen] if chosen else counts:
            batch = map_rows(inputs, itemgetter(slice(count)))
            graphs = ForwardGraphs(self._family, "A measured forward pass") if self._graphs else None
            try:
                times: list[float] = []
                for _ in range(3):
                    output, spent_s = self._timed_forward(batch, batch_key_extra, graphs)
                    times.append(spent_s)
                    yield
                seconds[count] = min(times[1:])  # the first forward pass of a shape also prepares kernels
                if not has_bucket:
                    output, _ = self._timed_forward(batch, batch_key_extra)
                    if expected is not None and not torch.equal(output[: len(expected)], expected):
                        probe.differing.add(count)
                    expected = output
            except Exception as error:
                if count == own or not is_out_of_memory(error):
                    raise
            finally:
                graphs = None  # frees their memory, also where a stopped probe is collected as garbage
            if count not in seconds:
                if not chosen:
                    break
                self.limit_bucket(shape, count // 2)  # it was chosen with more memory
                yield from self._choose_bucket(probe, state)
                return
            if has_bucket and not chosen and seconds[count] > _MAX_BUCKET_COST * seconds[own]:
                break
            if not has_bucket and count > own and _MIN_SPEEDUP * seconds[count] > 2 * seconds[count // 2]:
                break
        if not has_bucket:
            probe.seconds, probe.verdict = seconds, "close" if probe.differing else "exact"
            return
        bucket = chosen or self._buckets.put(
            str(shape), max(count for count in seconds if seconds[count] <= _MAX_BUCKET_COST * seconds[own])
        )
        exact = False
        while not exact:
            batch = map_rows(inputs, itemgetter(slice(bucket)))
            if self._compiled is not None and shape in self.compiled_shapes:
                self._compiled.compile(batch, f"{probe.width}x{probe.height}")
                seconds.clear()
            if bucket not in seconds:
                seconds[bucket] = self._timed_forward(batch, batch_key_extra)[1]
                yield
            exact = yield from self._is_exact(batch, batch_key_extra)
            if bucket == own:
                break
            if not exact:
                probe.differing.add(bucket)
                bucket = self._buckets.put(
                    str(shape), max(count for count in counts if count < bucket), replace=True
                )
        probe.verdict = "exact" if exact else "close"
        probe.seconds = {bucket: seconds[bucket]}

    def _is_exact(
        self, batch: ForwardInputs, batch_key_extra: tuple[Hashable, ...]
    ) -> Generator[None, None, bool]:
        """Whether the bits of a row depend neither on its position nor on the other rows of the batch."""
        if len(batch[0]) == 1:
            return True
        output, _ = self._timed_forward(batch, batch_key_extra)
        yield
        reversed_output, _ = self._timed_forward(map_rows(batch, lambda t: t.flip(0)), batch_key_extra)
        yield
        one_row = map_rows(batch, lambda t: t[:1].expand_as(t).contiguous())  # padded with copies of itself
        copies, _ = self._timed_forward(one_row, batch_key_extra)
        yield
        return torch.equal(output, reversed_output.flip(0)) and torch.equal(copies[-1], output[0])

    def _compare_row_counts(self, probe: Probe, state: DenoisingState) -> Iterator[None]:
        """Replace the layers that need it at this shape, then compare rows between batches."""
        generator = torch.Generator("cpu").manual_seed(0)
        max_rows = max(2, self._max_rows)
        inputs, batch_key_extra = random_rows(state, max_rows, generator), state.batch_key_extra
        if self._replace_layers:
            one_row = map_rows(inputs, lambda tensor: tensor[:1])
            probe.replaced_layers = make_layers_invariant(
                self._networks,
                lambda: self._family.forward(*one_row, batch_key_extra=batch_key_extra),
                self._max_rows,
            )
            yield

        own = self._rows_per_image
        spent_s = 0.0
        expected: list[Tensor] = []  # outputs of the first rows in earlier batches
        for count in sorted({count for count in _ROW_COUNTS if count < max_rows} | {max_rows}):
            if count > max(1, 2 * len(expected)):
                continue  # even with the reversed order, the expected rows would not cover every position
            batch = map_rows(inputs, itemgetter(slice(count)))
            try:
                output, seconds = self._timed_forward(batch, batch_key_extra)
                yield
                reversed_batch = map_rows(batch, lambda tensor: tensor.flip(0))
                reversed_output, seconds_again = self._timed_forward(reversed_batch, batch_key_extra)
            except Exception as error:
                if count <= 2 or not is_out_of_memory(error):  # not even one guided image
                    raise
                return
            spent_s += seconds + seconds_again
            same_in_any_order = torch.equal(output, reversed_output.flip(0))
            exact = same_in_any_order and all(torch.equal(row, output[i]) for i, row in enumerate(expected))
            if count == own == 2 and same_in_any_order and not exact and self._enabled:
                # One row alone is then padded to two: what agrees with the rows of an image serves.
                probe.differing.add(1)
                del probe.seconds[1]
                expected, exact = [], True
            if not exact:
                probe.differing.add(count)
                if count <= own or not self._enabled:
                    probe.verdict = "close"
            # In strict mode, a larger batch that is not bit-exact is left out; others are enough.
            if exact or count <= own or not self._enabled:
                # The minimum, because the first forward pass of a shape also prepares kernels.
                probe.seconds[count] = min(seconds, seconds_again)
                expected += output[len(expected) :]
            # A request does not wait until larger batches are probed.
            probe.usable = max(probe.seconds) >= own
            if count >= 2 and spent_s > self._budget_s:
                return
            yield

    def _timed_forward(
        self,
        inputs: ForwardInputs,
        batch_key_extra: tuple[Hashable, ...],
        graphs: ForwardGraphs | None = None,
    ) -> tuple[Tensor, float]:
        forward = self._family.forward if graphs is None else graphs.forward
        started = self._clock()
        with self._leave_room(inputs[0]):
            output = forward(*inputs, batch_key_extra=batch_key_extra)
        synchronize(output)
        return output, self._clock() - started


def synchronize(output: Tensor) -> None:
    """Wait for the device work of this thread; otherwise a clock would only measure the kernel launches.

    Other CUDA streams, for example the one that decodes, continue.
    """
    if output.is_cuda:
        torch.cuda.current_stream(output.device).synchronize()
    elif output.device.type != "cpu":
        torch.accelerator.synchronize(output.device)
