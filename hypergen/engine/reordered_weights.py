"""Convolutions and linear layers of a denoiser on a CPU, with weights in the layout of oneDNN's kernels.

torch's own convolution brings its weights into that layout in every forward pass, and its linear layers use
another library, which is slower on some CPUs. Here weights are reordered once. The reordered ones replace the
original ones, which `weight.to_dense()` restores exactly; so they need no more memory. Activations stay
channels-last, the format of these kernels.

The rule which layers are replaced depends only on the layer and the processor. Bits would differ after a
restart if a clock chose. Measured on x86 with AVX-512: from 32x32 to 64x64 latents, no convolution or linear
layer of SD 1.5 is slower so (`python -m scripts.bench --cpu`).
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hypergen.models.family import Family

# Output sides from this size on need one layout; a larger one costs time only.
_LARGE_SIDE = 16
# Of a typical batch, for the choice of a layout; it is the same for all batches of two and more rows.
_ROWS, _LINEAR_ROWS = 4, 256
# Uninitialized bytes between two fields of oneDNN's memory descriptor.
_PADDING = slice(108, 112)


def use_reordered_weights(family: Family) -> None:
    """Reorder the weights of what runs in every step; predictions keep the memory format of the latents."""
    for network in (family.denoiser, *family.controlnets.values()):
        reorder_weights(network)
    _replace_forward(family, partial(_contiguous, family.forward))


def _contiguous(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return forward(*args, **kwargs).contiguous()


def reorder_weights(network: nn.Module) -> None:
    """Replace the forward of each layer that `can_reorder`, once."""
    for layer in network.modules():
        if has_reordered_weights(layer) or not can_reorder(layer):
            continue
        if isinstance(layer, nn.Conv2d):
            _replace_forward(layer, _ReorderedConvolution(layer))
        elif isinstance(layer, nn.Linear):
            _replace_forward(layer, _ReorderedLinear(layer))


def has_reordered_weights(layer: nn.Module) -> bool:
    return isinstance(layer.forward, _ReorderedConvolution | _ReorderedLinear)


def can_reorder(layer: nn.Module) -> bool:
    """Whether a layer can run on reordered weights, on this processor. Subclasses may read their weights."""
    if isinstance(layer, nn.Conv2d):
        supported = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return type(layer) is nn.Conv2d and supported and _is_supported(layer.weight)
    return isinstance(layer, nn.Linear) and type(layer) is nn.Linear and _is_supported(layer.weight)


def _is_supported(weight: Tensor) -> bool:
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    if not available or platform.machine() not in ("x86_64", "AMD64") or weight.device.type != "cpu":
        return False
    bfloat16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.layout == torch.strided and (weight.dtype == torch.float32 or bfloat16)


def _replace_forward(module: Any, forward: Callable[..., Tensor]) -> None:
    module.forward = forward


class _ReorderedConvolution:
    """The forward of a convolution; its output is channels-last.

    A few layers need another layout for small outputs. The bits are the same with any, because a kernel that
    needs another one converts it, slowly, in each forward pass. So the layout follows the size of the input.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        self._layer = layer
        self._geometry = (
            [int(size) for size in layer.padding],
            list(layer.stride),
            list(layer.dilation),
            layer.groups,
        )
        self._layout = b""
        self._layouts: dict[tuple[int, ...], bytes] = {}

    def __call__(self, x: Tensor) -> Tensor:
        sides = tuple(
            min(_LARGE_SIDE, side // stride)
            for side, stride in zip(x.shape[2:], self._layer.stride, strict=True)
        )
        if not self._layout or self._layouts.get(sides) != self._layout:
            self._reorder_for(x.shape, sides)
        output: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._layer.weight, self._layer.bias, *self._geometry, "none", [], ""
        )
        return output

    def _reorder_for(self, shape: torch.Size, sides: tuple[int, ...]) -> None:
        weight = self._layer.weight.detach()
        dense = weight.to_dense() if weight.is_mkldnn else weight
        reordered = torch.ops.mkldnn._reorder_convolution_weight(dense, *self._geometry, [_ROWS, *shape[1:]])
        self._layouts[sides] = _layout(reordered)
        if self._layouts[sides] != self._layout:
            self._layer.weight = nn.Parameter(reordered, requires_grad=False)
            self._layout = self._layouts[sides]


def _layout(weight: Tensor) -> bytes:
    descriptor = torch.ops.mkldnn._get_mkldnn_serialized_md(weight).clone()
    descriptor[_PADDING] = 0
    return bytes(descriptor.numpy())


class _ReorderedLinear:
    """The forward of a linear layer.

    Its kernel computes each row in the same way for any number of rows and tokens from two on; one alone is
    padded.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        reordered = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _LINEAR_ROWS)
        layer.weight = nn.Parameter(reordered, requires_grad=False)

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:
            padded = functional.pad(x.reshape(1, -1), (0, 0, 0, 1))
            return self._multiply(padded)[:1].reshape(*x.shape[:-1], -1)
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        layer = self._layer
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
