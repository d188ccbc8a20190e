"""Batch-invariant layers: the bits of a row do not depend on the number of rows in the batch.

On CPU, most kernels of reordered weights are batch-invariant (`reordered_weights.py`). A convolution or group
norm that fails a test at its real input computes one row after another. In channels-last, group norms over
large latents fail: their kernel divides its sums between threads by rows. Linear layers without reordered
weights and with a 2-D input of few rows (timestep and pooled embeddings) are padded to 16 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hypergen.engine.reordered_weights import has_reordered_weights

_LINEAR_ROWS = 16
# Multiply-adds of a convolution in a test with many rows: about 50 ms on one core.
_MAX_TEST_WORK = 2e9


def make_linears_invariant(denoiser: nn.Module) -> None:
    for layer in denoiser.modules():
        if isinstance(layer, nn.Linear) and not has_reordered_weights(layer):
            _replace_forward(layer, partial(_padded_linear, layer.forward))


def _replace_forward(layer: nn.Module, forward: Callable[..., Tensor]) -> None:
    layer.forward = forward


def _padded_linear(forward: Callable[[Tensor], Tensor], x: Tensor, *args: Any) -> Tensor:
    """Pad with zeros to 16 rows: the CPU's kernels are batch-invariant from 4 rows on."""
    if x.dim() != 2 or x.shape[0] >= _LINEAR_ROWS:
        return forward(x, *args)
    return forward(functional.pad(x, (0, 0, 0, _LINEAR_ROWS - x.shape[0])), *args)[: x.shape[0]]


def make_layers_invariant(denoiser: nn.Module, run_one_row: Callable[[], object], max_rows: int) -> int:
    """Test each convolution and group norm with its real input; those that are not bit-exact run by row.

    The result depends only on the layer and the shape of its input, not on clocks, so that it is the same
    after a restart.

    Args:
        run_one_row: runs the denoiser on one row.
        max_rows: rows of the largest batch.

    Returns:
        How many layers are replaced at this shape.
    """
    replaced: set[nn.Module] = set()

    def test_layer(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        (x,) = inputs
        by_row = layer.forward if isinstance(layer.forward, ByRow) else None
        if by_row is None or not by_row.replaces(x):
            counts = {2, min(max_rows, max(2, int(_MAX_TEST_WORK / _work_per_row(layer, output))))}
            if all(_same_bits(layer, x, output, count) for count in counts):
                return
            if by_row is None:
                by_row = ByRow(layer.forward)
                _replace_forward(layer, by_row)
            by_row.replace_for(x)
        replaced.add(layer)

    hooks = [
        layer.register_forward_hook(test_layer)
        for layer in denoiser.modules()
        if isinstance(layer, nn.Conv2d | nn.GroupNorm)
    ]
    try:
        run_one_row()
    finally:
        for hook in hooks:
            hook.remove()
    return len(replaced)


def _work_per_row(layer: nn.Module, output: Tensor) -> int:
    weights = layer.weight.numel() if isinstance(layer, nn.Conv2d) else output.shape[1]
    return weights * output[0, 0].numel()


def _same_bits(layer: nn.Module, x: Tensor, output: Tensor, count: int) -> bool:
    rows = torch.cat([x] * count)  # in the memory format of x
    return torch.equal(layer.forward(rows), output.expand(count, *output.shape[1:]))


class ByRow:
    """The forward of a layer that computes one row after another at some input shapes."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self._forward = forward
        self._shapes: set[torch.Size] = set()

    def replaces(self, x: Tensor) -> bool:
        return x.shape[1:] in self._shapes

    def replace_for(self, x: Tensor) -> None:
        """Compute inputs of this shape by row from now on."""
        self._shapes.add(x.shape[1:])

    def __call__(self, x: Tensor) -> Tensor:
        if not self.replaces(x) or x.shape[0] == 1:
            return self._forward(x)
        return torch.cat([self._forward(row) for row in x.split(1)])
