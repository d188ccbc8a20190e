"""Batch-invariant layers: the bits of a row do not depend on the number of rows in the batch.

On CPU, two kinds of layers need a replacement. Linear layers with a 2-D input of few rows (timestep and
pooled embeddings) are padded to 16 rows. Convolutions with few channels or small latents use prepacked
weights, as in compiled models. That kernel is the same for any number of rows. It is also faster, because
otherwise the weights are reordered in every forward pass. Without it, a single row runs as two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_LINEAR_ROWS = 16
# Multiply-adds of a convolution in a test with many rows: about 50 ms on one core.
_MAX_TEST_WORK = 2e9


def make_linears_invariant(denoiser: nn.Module) -> None:
    for layer in denoiser.modules():
        if isinstance(layer, nn.Linear):
            _replace_forward(layer, partial(_padded_linear, layer.forward))


def _replace_forward(layer: nn.Module, forward: Callable[..., Tensor]) -> None:
    layer.forward = forward


def _padded_linear(forward: Callable[[Tensor], Tensor], x: Tensor, *args: Any) -> Tensor:
    """Pad with zeros to 16 rows: the CPU's kernels are batch-invariant from 4 rows on."""
    if x.dim() != 2 or x.shape[0] >= _LINEAR_ROWS:
        return forward(x, *args)
    return forward(functional.pad(x, (0, 0, 0, _LINEAR_ROWS - x.shape[0])), *args)[: x.shape[0]]


def make_convolutions_invariant(denoiser: nn.Module, run_one_row: Callable[[], object], max_rows: int) -> int:
    """Test each convolution with its real input, and replace it at this input shape if it is not bit-exact.

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
        assert isinstance(layer, nn.Conv2d)
        (x,) = inputs
        invariant = layer.forward if isinstance(layer.forward, InvariantConvolution) else None
        if invariant is None or not invariant.replaces(x):
            counts = {2, min(max_rows, max(2, int(_MAX_TEST_WORK / _work_per_row(layer, output))))}
            if all(_same_bits(layer, x, output, count) for count in counts):
                return
            if invariant is None:
                invariant = InvariantConvolution(layer)
                _replace_forward(layer, invariant)
            invariant.replace_for(x)
        replaced.add(layer)

    hooks = [
        layer.register_forward_hook(test_layer)
        for layer in denoiser.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    try:
        run_one_row()
    finally:
        for hook in hooks:
            hook.remove()
    return len(replaced)


def _work_per_row(layer: nn.Conv2d, output: Tensor) -> int:
    return layer.weight.numel() * output.shape[-2] * output.shape[-1]


def _same_bits(layer: nn.Conv2d, x: Tensor, output: Tensor, count: int) -> bool:
    rows = x.expand(count, -1, -1, -1).contiguous()
    return torch.equal(layer._conv_forward(rows, layer.weight, layer.bias), output.expand(count, -1, -1, -1))


class InvariantConvolution:
    """A replacement for the forward of a convolution; at other input shapes it calls the original."""

    # Each shape has its own copy of prepacked weights; an evicted one is packed again when needed.
    _MAX_PREPACKED_SHAPES = 4

    def __init__(self, layer: nn.Conv2d) -> None:
        self._layer = layer
        self._forward = layer.forward
        self._replaced: set[torch.Size] = set()
        self._prepacked_weight = lru_cache(self._MAX_PREPACKED_SHAPES)(self._prepack_weight)
        self._use_prepacked = _can_prepack(layer)

    def replaces(self, x: Tensor) -> bool:
        return x.shape[1:] in self._replaced

    def replace_for(self, x: Tensor) -> None:
        """Replace the layer for inputs of this shape from now on."""
        self._replaced.add(x.shape[1:])

    def __call__(self, x: Tensor) -> Tensor:
        if not self.replaces(x):
            return self._forward(x)
        if not self._use_prepacked:
            if x.shape[0] > 1:
                return self._forward(x)
            return self._forward(x.expand(2, -1, -1, -1).contiguous())[:1]
        output: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._prepacked_weight(x.shape[1:]), self._layer.bias, *_geometry(self._layer), "none", [], ""
        )
        # The kernel's output is channels-last. In that format, the kernels of later layers divide their work
        # between threads by rows.
        return output.contiguous()

    def _prepack_weight(self, shape: torch.Size) -> Tensor:
        """The weights in the layout that oneDNN needs for this shape of a row."""
        return torch.ops.mkldnn._reorder_convolution_weight(
            self._layer.weight, *_geometry(self._layer), [4, *shape]
        )


def _can_prepack(layer: nn.Conv2d) -> bool:
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    zero_padding = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    weight = layer.weight
    supported = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    return available and zero_padding and supported


def _geometry(layer: nn.Conv2d) -> tuple[list[int], list[int], list[int], int]:
    return [int(size) for size in layer.padding], list(layer.stride), list(layer.dilation), layer.groups
