"""Convolutions and linear layers of a denoiser on a CPU, with weights in the layout of oneDNN's kernels.

torch's own convolution brings its weights into that layout in every forward pass, and its linear layers use
another library, which is slower on some CPUs. Here weights are reordered once. The reordered ones replace the
original ones, which `weight.to_dense()` restores exactly; so they need no more memory. Activations stay
channels-last, the format of these kernels.

The rule which layers are replaced depends only on the layer and the processor. Bits would differ after a
restart if a clock chose. `python -m scripts.bench --cpu` measures SD 1.5 so, against diffusers as it is.
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

# Of a typical batch, for the choice of a linear layer's layout, which fits every other one.
_LINEAR_ROWS = 256
# Input shapes of which a convolution keeps the layout; more would be found again.
_MAX_SHAPES = 100
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

    oneDNN chooses a kernel, and with it a layout of the weights, by the size of the input, its rows and the
    number of threads; without AVX-512 in no simple way. Weights in another layout would be converted in each
    forward pass, which can take longer than the convolution. So they are in the layout for one row of the
    last size, and a batch that needs another one is computed row by row, which takes the same time.
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
        one_row = (1, *x.shape[1:])
        layout = self._layout_for(one_row)
        if self._layout_for(tuple(x.shape)) != layout:
            return torch.cat([self(row) for row in x.split(1)])
        if self._layout != layout:
            self._use(self._reorder_for(one_row), layout)
        output: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._layer.weight, self._layer.bias, *self._geometry, "none", [], ""
        )
        return output

    def _layout_for(self, shape: tuple[int, ...]) -> bytes:
        if shape not in self._layouts:
            reordered = self._reorder_for(shape)
            if len(self._layouts) == _MAX_SHAPES:
                self._layouts.clear()
            self._layouts[shape] = _layout(reordered)
            if not self._layout:
                self._use(reordered, self._layouts[shape])
        return self._layouts[shape]

    def _reorder_for(self, shape: tuple[int, ...]) -> Tensor:
        weight = self._layer.weight.detach()
        dense = weight.to_dense() if weight.is_mkldnn else weight
        return torch.ops.mkldnn._reorder_convolution_weight(dense, *self._geometry, list(shape))

    def _use(self, reordered: Tensor, layout: bytes) -> None:
        self._layer.weight = nn.Parameter(reordered, requires_grad=False)
        self._layout = layout


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
