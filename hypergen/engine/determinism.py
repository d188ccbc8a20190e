"""Same seed, same bytes: the rule that makes rows independent of their neighbours, and the probe that proves
it.

A kernel may add numbers in another order when the batch has another size, and then an image depends, in its
last bits, on who shared the forward pass. On CPU two operations were found to do so: linear layers over a 2-D
input with few rows (timestep and pooled embeddings), and some convolutions over a single row. The rule: such
linear inputs are filled up to 16 rows, and such convolutions, found by trying each at its real input, run
over two rows. Everything else is not
assumed but probed: rows 1, 2, 3, 4, 8 ... of the same input must agree bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hypergen.generation import Verdict
from hypergen.models.family import Family

_LINEAR_ROWS = 16
_ROW_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


@dataclass
class Probe:
    """What was found for one drawn size.

    Attributes:
        verdict: exact when the rows of all passes in `seconds` agree bit for bit. In strict mode those are
            the only ones that serve, so the verdict covers everything that is drawn.
        seconds: rows -> seconds of one pass, the first points of the cost curve.
        repaired: layers that the rule changed for this size.
    """

    verdict: Verdict = "exact"
    seconds: dict[int, float] = field(default_factory=dict)
    repaired: int = 0


class DeterminismRule:
    """Applies the rule to one denoiser, size by size as sizes are first drawn.

    Args:
        enabled: False probes and reports, but changes nothing (`--determinism fast`).
        max_rows: the largest forward pass the engine would make.
        budget_s: a probe stops trying more rows after this long, which keeps large models on slow devices
            usable.
    """

    _SLOW_PASS_S = 2.0

    def __init__(self, family: Family, *, enabled: bool, max_rows: int, budget_s: float = 20) -> None:
        self._family = family
        self._enabled = enabled
        self._max_rows = max_rows
        self._budget_s = budget_s
        self._doubled: set[nn.Module] = set()
        if enabled:
            for module in family.denoiser.modules():
                if isinstance(module, nn.Linear):
                    _replace_forward(module, _filled_linear)

    def probe(self, width: int, height: int) -> Probe:
        """Repair what a drawn size of width x height pixels needs, then compare passes of different rows."""
        generator = torch.Generator("cpu").manual_seed(0)
        most = max(2, self._max_rows)
        arguments = self._family.probe_rows(width, height, most, generator)
        found = Probe()
        if self._enabled:
            found.repaired = self._double_single_row_convolutions([rows[:1] for rows in arguments])

        started = time.monotonic()
        alone: list[Tensor] = []
        for count in sorted({count for count in _ROW_COUNTS if count < most} | {most}):
            # Reversed, so that a row meets other neighbours at another position than in the pass before.
            rows = [argument[:count].flip(0) for argument in arguments]
            output, seconds = self._timed_forward(rows)
            output = output.flip(0)
            agrees = all(torch.equal(one, output[i]) for i, one in enumerate(alone))
            if not agrees and self._enabled and count > 2:
                break  # smaller passes are exact, and they are enough to serve with
            if not agrees:
                found.verdict = "close"
            found.seconds[count] = seconds
            alone = [*alone, *output[len(alone) :]]
            if count >= 2 and time.monotonic() - started > self._budget_s:
                break
        return found

    def _timed_forward(self, rows: list[Tensor]) -> tuple[Tensor, float]:
        """A pass and its seconds; twice, because the first one of a shape also prepares kernels, unless it is
        slow.
        """
        seconds: list[float] = []
        while True:
            started = time.monotonic()
            output = self._family.forward(*rows)
            _synchronize(output)
            seconds.append(time.monotonic() - started)
            if len(seconds) == 2 or seconds[0] > self._SLOW_PASS_S:
                return output, min(seconds)

    def _double_single_row_convolutions(self, row: list[Tensor]) -> int:
        differing: list[nn.Module] = []

        def compare(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(module, nn.Conv2d)
            (x,) = inputs
            if module not in self._doubled and x.shape[0] == 1:
                neighbour = x.flip(-1)
                pair = module._conv_forward(torch.cat([x, neighbour]), module.weight, module.bias)
                if not torch.equal(pair[:1], output):
                    differing.append(module)

        hooks = [
            module.register_forward_hook(compare)
            for module in self._family.denoiser.modules()
            if isinstance(module, nn.Conv2d)
        ]
        try:
            self._family.forward(*row)
        finally:
            for hook in hooks:
                hook.remove()
        for module in differing:
            _replace_forward(module, _doubled_convolution)
            self._doubled.add(module)
        return len(differing)


def _replace_forward(module: nn.Module, replacement: Callable[..., Tensor]) -> None:
    module.forward = partial(replacement, module.forward)


def _filled_linear(forward: Callable[[Tensor], Tensor], x: Tensor, *args: Any) -> Tensor:
    """Zero rows up to 16: with 4 or more rows the CPU's kernels give each row the same bits."""
    if x.dim() != 2 or x.shape[0] >= _LINEAR_ROWS:
        return forward(x, *args)
    return forward(functional.pad(x, (0, 0, 0, _LINEAR_ROWS - x.shape[0])), *args)[: x.shape[0]]


def _doubled_convolution(forward: Callable[[Tensor], Tensor], x: Tensor, *args: Any) -> Tensor:
    """A single row twice: with 2 or more rows the CPU's kernels give each row the same bits."""
    if x.shape[0] != 1:
        return forward(x, *args)
    return forward(x.expand(2, -1, -1, -1).contiguous(), *args)[:1]


def _synchronize(output: Tensor) -> None:
    if output.device.type == "cuda":
        torch.cuda.synchronize()
