"""Same seed, same bytes: the rule that makes rows independent of their neighbours, and the probe that proves
it.

A kernel may add numbers in another order when the batch has another size, and then an image depends, in its
last bits, on who shared the forward pass. The rule makes the layers that were found to do so row-invariant
(`invariance.py`). Everything else is not assumed but probed: the same rows must agree bit for bit in passes
of 1, 2, 3, 4, 6 ... rows, at every position. With more threads or odd sizes some numbers of rows do not;
those are left out.
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
from hypergen.models.cfg import Rows, map_rows, random_rows
from hypergen.models.family import Family

_ROW_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


@dataclass
class Probe:
    """What was found for one drawn size and one length of prompts.

    Attributes:
        passes: runs the probe, one forward pass for each item; the rest is final when it is used up.
        verdict: exact when the rows of all passes in `seconds` agree bit for bit. In strict mode those are
            the only ones that serve, so the verdict covers everything that is drawn.
        seconds: rows -> seconds of one pass, the first points of the cost curve.
        differing: numbers of rows whose passes gave a row other bits.
        replaced: layers that the rule changed for this size.
    """

    width: int
    height: int
    passes: Iterator[None] = field(default_factory=lambda: iter(()), repr=False)
    verdict: Verdict = "exact"
    seconds: dict[int, float] = field(default_factory=dict)
    differing: set[int] = field(default_factory=set)
    replaced: int = 0


class BatchInvariance:
    """Applies the rule to one denoiser, size by size as sizes are first drawn.

    Args:
        enabled: False probes and reports, but changes nothing (`--determinism fast`).
        replaces: False leaves the layers as they are: a compiled denoiser has none to replace any more.
        max_rows: the largest forward pass the engine would make.
        budget_s: a probe stops trying more rows after this long, which keeps large models on slow devices
            usable.
        clock: the seconds of the cost curve's first points.
    """

    def __init__(
        self,
        family: Family,
        *,
        enabled: bool,
        replaces: bool = True,
        max_rows: int,
        budget_s: float = 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._family = family
        self._enabled = enabled
        self._max_rows = max_rows
        self._budget_s = budget_s
        self._clock = clock
        self._replaces = enabled and replaces
        self._networks = nn.ModuleList([family.denoiser, *family.controlnets.values()])
        if self._replaces:
            make_linears_invariant(self._networks)

    def probe(self, state: DenoisingState) -> Probe:
        """A probe, not yet run, of images like this one: of its shape, and with as long a prompt."""
        request = state.request
        found = Probe(*self._family.generation_size(request.width, request.height))
        self.restart(found, state)
        return found

    def restart(self, probe: Probe, state: DenoisingState) -> None:
        """Let a probe whose passes were given up try all of them, with an image of the same shape."""
        probe.passes = self._passes(probe, state)

    def _passes(self, found: Probe, state: DenoisingState) -> Iterator[None]:
        """Repair what the shape needs, then compare passes of different rows."""
        generator = torch.Generator("cpu").manual_seed(0)
        most = max(2, self._max_rows)
        arguments, batch_key_extra = random_rows(state, most, generator), state.batch_key_extra
        if self._replaces:
            one_row = map_rows(arguments, lambda tensor: tensor[:1])
            found.replaced = make_convolutions_invariant(
                self._networks,
                lambda: self._family.forward(*one_row, batch_key_extra=batch_key_extra),
                self._max_rows,
            )
            yield

        spent_s = 0.0
        known: list[Tensor] = []  # outputs of the first rows, as the passes so far gave them
        for count in sorted({count for count in _ROW_COUNTS if count < most} | {most}):
            if count > max(1, 2 * len(known)):
                continue  # in two orders, the known rows would not stand at every position
            rows = map_rows(arguments, itemgetter(slice(count)))
            try:
                output, seconds = self._timed_forward(rows, batch_key_extra)
                yield
                reversed_rows = map_rows(rows, lambda tensor: tensor.flip(0))
                reversed_output, seconds_again = self._timed_forward(reversed_rows, batch_key_extra)
            except torch.OutOfMemoryError:
                if count <= 2:  # not even one guided image
                    raise
                return
            spent_s += seconds + seconds_again
            agrees = torch.equal(output, reversed_output.flip(0)) and all(
                torch.equal(one, output[i]) for i, one in enumerate(known)
            )
            if not agrees:
                found.differing.add(count)
                if count <= 2 or not self._enabled:
                    found.verdict = "close"
            # With the rule, a larger pass that differs is left out: the others are enough to serve with.
            if agrees or count <= 2 or not self._enabled:
                # The first pass of a shape also prepares kernels.
                found.seconds[count] = min(seconds, seconds_again)
                known += output[len(known) :]
            if count >= 2 and spent_s > self._budget_s:
                return
            yield

    def _timed_forward(self, rows: Rows, batch_key_extra: tuple[Hashable, ...]) -> tuple[Tensor, float]:
        started = self._clock()
        output = self._family.forward(*rows, batch_key_extra=batch_key_extra)
        synchronize(output)
        return output, self._clock() - started


def synchronize(output: Tensor) -> None:
    """Wait until this thread's work is done, else a clock would tell how fast kernels are queued; what other
    streams decode and read goes on.
    """
    if output.is_cuda:
        torch.cuda.current_stream(output.device).synchronize()
    elif output.device.type != "cpu":
        torch.accelerator.synchronize(output.device)
