"""Layers made row-invariant: a row's bits do not depend on how many others share the pass.

On CPU two operations were found to need it. Linear layers over a 2-D input with few rows (timestep and pooled
embeddings) are filled up to 16 rows. Convolutions over few channels or small latents run on weights that were
reordered once, as compiled models do: that kernel is the same for any number of rows, and it is faster, for
otherwise the weights are reordered at every pass. Where it is missing, a single row runs as two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_LINEAR_ROWS = 16
# Multiply-adds that a layer may cost when it is tried with many rows: about 50 ms on one core.
_TRIAL_WORK = 2e9


def make_linears_invariant(denoiser: nn.Module) -> None:
    for layer in denoiser.modules():
        if isinstance(layer, nn.Linear):
            _replace_forward(layer, partial(_filled_linear, layer.forward))


def _replace_forward(layer: nn.Module, forward: Callable[..., Tensor]) -> None:
    layer.forward = forward


def _filled_linear(forward: Callable[[Tensor], Tensor], x: Tensor, *args: Any) -> Tensor:
    """Zero rows up to 16: with 4 or more rows the CPU's kernels give each row the same bits."""
    if x.dim() != 2 or x.shape[0] >= _LINEAR_ROWS:
        return forward(x, *args)
    return forward(functional.pad(x, (0, 0, 0, _LINEAR_ROWS - x.shape[0])), *args)[: x.shape[0]]


def make_convolutions_invariant(denoiser: nn.Module, run_one_row: Callable[[], object], max_rows: int) -> int:
    """Try each convolution at its real input, and replace those that give a row other bits among others.

    What is found depends on a layer and the shape of its input alone, not on clocks, so that it is the same
    after every start.

    Args:
        run_one_row: runs the denoiser over one row of the shape in question.
        max_rows: the largest forward pass there will be.

    Returns:
        How many layers are replaced at this shape.
    """
    replaced: set[nn.Module] = set()

    def compare(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        (x,) = inputs
        known = layer.forward if isinstance(layer.forward, InvariantConvolution) else None
        if known is None or not known.replaces(x):
            counts = {2, min(max_rows, max(2, int(_TRIAL_WORK / _work_per_row(layer, output))))}
            if all(_same_bits(layer, x, output, count) for count in counts):
                return
            if known is None:
                known = InvariantConvolution(layer)
                _replace_forward(layer, known)
            known.replace_layer(x)
        replaced.add(layer)

    hooks = [
        layer.register_forward_hook(compare) for layer in denoiser.modules() if isinstance(layer, nn.Conv2d)
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
    """Stands in for the forward of a convolution; only at the shapes it replaces does it change anything."""

    # Reordered weights are a copy for each shape; one that is needed again later is made again.
    _KEPT_SHAPES = 4

    def __init__(self, layer: nn.Conv2d) -> None:
        self._layer = layer
        self._forward = layer.forward
        self._replaced: set[torch.Size] = set()
        self._weight_for = lru_cache(self._KEPT_SHAPES)(self._reordered_weight)
        self._packs = _can_pack(layer)

    def replaces(self, x: Tensor) -> bool:
        return x.shape[1:] in self._replaced

    def replace_layer(self, x: Tensor) -> None:
        """From now on, at inputs of this shape."""
        self._replaced.add(x.shape[1:])

    def __call__(self, x: Tensor) -> Tensor:
        if not self.replaces(x):
            return self._forward(x)
        if not self._packs:
            if x.shape[0] > 1:
                return self._forward(x)
            return self._forward(x.expand(2, -1, -1, -1).contiguous())[:1]
        output: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._weight_for(x.shape[1:]), self._layer.bias, *_geometry(self._layer), "none", [], ""
        )
        # Back from channels last, in which the layers after it would take kernels that threads divide by
        # rows.
        return output.contiguous()

    def _reordered_weight(self, shape: torch.Size) -> Tensor:
        """The weights in the order that oneDNN wants them in at this shape of a row."""
        return torch.ops.mkldnn._reorder_convolution_weight(
            self._layer.weight, *_geometry(self._layer), [4, *shape]
        )


def _can_pack(layer: nn.Conv2d) -> bool:
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    weight = layer.weight
    return there and plain and weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)


def _geometry(layer: nn.Conv2d) -> tuple[list[int], list[int], list[int], int]:
    return [int(size) for size in layer.padding], list(layer.stride), list(layer.dilation), layer.groups
