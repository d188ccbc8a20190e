"""Batch invariance of the denoiser, and the probe that tests it.

A kernel may add numbers in another order for another batch size. Then the last bits of an image depend on the
other rows of its batch. The layers that are known to do so are replaced (`layers.py`). The rest is tested:
the same rows must be bit-exact in batches of 1, 2, 3, 4, 6 ... rows, at every position. With more threads or
unusual image sizes some row counts are not bit-exact; these are not used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter

import torch
from torch import Tensor, nn

from hypergen.denoising.denoising_state import DenoisingState
from hypergen.engine.batch_invariance.layers import make_convolutions_invariant, make_linears_invariant
from hypergen.events import Verdict
from hypergen.models.cfg import ForwardInputs, map_rows, random_rows
from hypergen.models.family import Family

_ROW_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


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
    """

    width: int
    height: int
    forwards: Iterator[None] = field(default_factory=lambda: iter(()), repr=False)
    verdict: Verdict = "exact"
    seconds: dict[int, float] = field(default_factory=dict)
    differing: set[int] = field(default_factory=set)
    replaced_layers: int = 0


class BatchInvariance:
    """Replaces layers of one denoiser and probes each generation size before its first image.

    Args:
        enabled: False probes and reports, but replaces no layer (`--determinism fast`).
        replace_layers: False replaces no layer, because a compiled denoiser would not use it.
        max_rows: rows of the largest batch.
        budget_s: a probe tries no more row counts after this many seconds, for large models on slow devices.
        clock: seconds, for the first points of the cost curve.
    """

    def __init__(
        self,
        family: Family,
        *,
        enabled: bool,
        replace_layers: bool = True,
        max_rows: int,
        budget_s: float = 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._family = family
        self._enabled = enabled
        self._max_rows = max_rows
        self._budget_s = budget_s
        self._clock = clock
        self._replace_layers = enabled and replace_layers
        self._networks = nn.ModuleList([family.denoiser, *family.control_models.values()])
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
        probe.forwards = self._run_probe(probe, state)

    def _run_probe(self, probe: Probe, state: DenoisingState) -> Iterator[None]:
        """Replace the layers that need it at this shape, then compare rows between batches."""
        generator = torch.Generator("cpu").manual_seed(0)
        max_rows = max(2, self._max_rows)
        inputs, batch_key_extra = random_rows(state, max_rows, generator), state.batch_key_extra
        if self._replace_layers:
            one_row = map_rows(inputs, lambda tensor: tensor[:1])
            probe.replaced_layers = make_convolutions_invariant(
                self._networks,
                lambda: self._family.forward(*one_row, batch_key_extra=batch_key_extra),
                self._max_rows,
            )
            yield

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
            except torch.OutOfMemoryError:
                if count <= 2:  # not even one guided image
                    raise
                return
            spent_s += seconds + seconds_again
            exact = torch.equal(output, reversed_output.flip(0)) and all(
                torch.equal(row, output[i]) for i, row in enumerate(expected)
            )
            if not exact:
                probe.differing.add(count)
                if count <= 2 or not self._enabled:
                    probe.verdict = "close"
            # In strict mode, a larger batch that is not bit-exact is left out; others are enough.
            if exact or count <= 2 or not self._enabled:
                # The minimum, because the first forward pass of a shape also prepares kernels.
                probe.seconds[count] = min(seconds, seconds_again)
                expected += output[len(expected) :]
            if count >= 2 and spent_s > self._budget_s:
                return
            yield

    def _timed_forward(
        self, inputs: ForwardInputs, batch_key_extra: tuple[Hashable, ...]
    ) -> tuple[Tensor, float]:
        started = self._clock()
        output = self._family.forward(*inputs, batch_key_extra=batch_key_extra)
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
