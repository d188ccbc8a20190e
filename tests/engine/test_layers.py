"""Batch-invariant layers are bit-exact for any number of rows and do not change other shapes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from hypergen.engine.batch_invariance.layers import make_layers_invariant, make_linears_invariant

_COUNTS = (1, 2, 3, 4, 6, 8, 16)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def _layer(channels: int = 64, *, kernel_size: int = 3, stride: int = 1) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, channels, kernel_size, stride, padding=kernel_size // 2)


def _rows(side: int, channels: int = 64) -> Tensor:
    return torch.randn((16, channels, side, side), generator=torch.Generator().manual_seed(1))


def _is_batch_invariant(layer: nn.Module, rows: Tensor) -> bool:
    outputs = [layer(rows[:count])[:1] for count in _COUNTS]
    return all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("side", [2, 4, 7, 8])
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_a_replaced_convolution_is_batch_invariant(side: int, kernel_size: int, stride: int) -> None:
    layer = _layer(kernel_size=kernel_size, stride=stride)
    rows = _rows(side)
    before = layer(rows[:1])
    make_layers_invariant(layer, lambda: layer(rows[:1]), 16)
    assert _is_batch_invariant(layer, rows)
    assert torch.equal(layer(rows[:1]), before)


@pytest.mark.parametrize("side", [2, 4, 7, 8, 16])
def test_a_convolution_is_replaced_only_if_it_is_not_batch_invariant(side: int) -> None:
    layer, rows = _layer(), _rows(side)
    differs = any(not torch.equal(layer(rows[:1]), layer(rows[:count])[:1]) for count in (2, 16))
    assert make_layers_invariant(layer, lambda: layer(rows[:1]), 16) == differs


def test_other_shapes_are_unchanged() -> None:
    layer = _layer()
    small, large = _rows(4), _rows(16)
    before = layer(large)
    make_layers_invariant(layer, lambda: layer(small[:1]), 16)
    assert torch.equal(layer(large), before)


@pytest.mark.usefixtures("two_threads")
def test_a_group_norm_over_large_channels_last_latents_is_batch_invariant() -> None:
    """Two threads divide the sums of one row, but take a row each of two."""
    layer = nn.GroupNorm(8, 64)
    rows = _rows(40).contiguous(memory_format=torch.channels_last)
    differs = not torch.equal(layer(rows[:1]), layer(rows[:2])[:1])
    assert make_layers_invariant(layer, lambda: layer(rows[:1]), 16) == differs
    assert _is_batch_invariant(layer, rows)
    assert layer(rows).is_contiguous(memory_format=torch.channels_last)


def test_a_replaced_linear_layer_is_batch_invariant() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 256)
    rows = torch.randn(16, 64)
    make_linears_invariant(layer)
    assert _is_batch_invariant(layer, rows)
    tokens = torch.randn(2, 5, 64)
    assert layer(tokens).shape == (2, 5, 256)
