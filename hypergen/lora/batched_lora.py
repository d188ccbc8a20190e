"""Batched LoRA: what LoRAs add to the rows of one forward pass, each row its own LoRAs with its own weights.

Base weights are never changed. A row's bits do not depend on its neighbours, and a row without a LoRA keeps
the base model's: only rows that have one are taken out, multiplied, and added to. Products of matrices run
for several rows at once, in pieces of sizes that were tried on the layer's own shape and gave each row the
bits that it gets alone. Larger windows than 1 x 1, and DoRA, run row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from hypergen.lora.weights import LayerWeights, Lora

# LoRAs of one row with their weights, in the order in which they are summed.
Loras = tuple[tuple[Lora, float], ...]

# Few sizes, so that few must be tried; the largest first.
_SIZES = (16, 8, 4, 2)


class _Entry(NamedTuple):
    row: int
    lora: Lora
    weight: float


class LoraBatch:
    """The LoRAs of a pass, as the hooks of its layers read them.

    Args:
        loras: of each row.
        pieces: how many rows may share a product.
    """

    def __init__(self, loras: Sequence[Loras], pieces: BatchSizeProbe) -> None:
        self._rows = len(loras)
        self._batch_sizes = pieces
        # First the first LoRA of every row, then the second of those that have two ...: each row's own order.
        self._rounds = [
            [_Entry(row, *own[place]) for row, own in enumerate(loras) if place < len(own)]
            for place in range(max(map(len, loras)))
        ]
        self._tensors: dict[tuple[tuple[int, float], ...], tuple[Tensor, Tensor]] = {}

    def add(self, layer: nn.Module, name: str, x: Tensor, output: Tensor) -> None:
        """Add to the output of a layer, in place, what the LoRAs of its rows make of its input."""
        if x.shape[0] != self._rows:
            raise RuntimeError(f"{name} sees {x.shape[0]} rows, the pass has {self._rows}.")
        for entries in self._rounds:
            together: dict[int, list[_Entry]] = {}
            for entry in entries:
                weights = entry.lora.layers.get(name)
                if weights is None:
                    continue
                if weights.down.dim() > 2 or weights.magnitude is not None or _strided(layer):
                    self._add_alone(layer, weights, entry, x, output)
                else:
                    together.setdefault(weights.rank, []).append(entry)
            for alike in together.values():
                self._add_together(layer, name, alike, x, output)

    def _add_together(
        self, layer: nn.Module, name: str, entries: list[_Entry], x: Tensor, output: Tensor
    ) -> None:
        first = entries[0].lora.layers[name]
        # Layers of one shape take one kernel.
        shape = type(layer), x.shape[1:], x.dtype, first.down.shape, first.up.shape
        position = 0
        while position < len(entries):
            left = len(entries) - position
            size = self._batch_sizes.largest(shape, left, lambda size: _same_bits(layer, first, x, size))
            piece = entries[position : position + size]
            rows, scales = self._on_device(piece, x)
            added = _product(layer, x.index_select(0, rows), [e.lora.layers[name] for e in piece], scales)
            output.index_add_(0, rows, added.to(output.dtype))
            position += size

    def _on_device(self, piece: list[_Entry], x: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers and scales of rows as tensors; a pass needs few of them again and again."""
        key = tuple((entry.row, entry.weight) for entry in piece)
        if key not in self._tensors:
            rows = torch.tensor([entry.row for entry in piece], device=x.device)
            scales = torch.tensor([entry.weight for entry in piece], device=x.device, dtype=x.dtype)
            self._tensors[key] = rows, scales.view(-1, 1, 1)
        return self._tensors[key]

    def _add_alone(
        self, layer: nn.Module, weights: LayerWeights, entry: _Entry, x: Tensor, output: Tensor
    ) -> None:
        row, result = x[entry.row : entry.row + 1].contiguous(), output[entry.row : entry.row + 1]
        added = entry.weight * _alone(layer, weights, row)
        if weights.magnitude is not None:
            # The whole layer is scaled, so what it gave without its bias is too.
            factor = _magnitude_factor(layer, weights, entry.weight)
            bias = getattr(layer, "bias", None)
            if isinstance(layer, nn.Conv2d):
                factor = factor.view(-1, 1, 1)
                bias = None if bias is None else bias.view(-1, 1, 1)
            base = result if bias is None else result - bias
            added = (factor - 1) * base + factor * added
        result += added.to(result.dtype)


class BatchSizeProbe:
    """How many rows may share one product, by the shape of layer and input, as tried once.

    Args:
        strict: False: as many as there are, without a trial.
    """

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._tried: dict[tuple[Hashable, int], bool] = {}

    def largest(self, shape: Hashable, rows: int, trial: Callable[[int], bool]) -> int:
        """The most of so many rows that may go together.

        Args:
            shape: of the layer, its factors and its input.
            trial: tells whether so many rows keep their bits there.
        """
        for size in _SIZES:
            if size <= rows and self._holds(shape, size, trial):
                return size
        return 1

    def _holds(self, shape: Hashable, size: int, trial: Callable[[int], bool]) -> bool:
        if self._strict and (shape, size) not in self._tried:
            self._tried[shape, size] = trial(size)
        return not self._strict or self._tried[shape, size]


def _strided(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and (
        tuple(layer.stride) != (1, 1) or layer.padding not in ((0, 0), 0, "valid")
    )


def _product(layer: nn.Module, x: Tensor, weights: Sequence[LayerWeights], scales: Tensor) -> Tensor:
    """`up(down(x))` of each row with its own factors.

    Args:
        x: one row for each of the weights.
        scales: shape (rows, 1, 1).
    """
    down = torch.stack([one.down for one in weights])
    scales = scales.to(down.dtype)
    up = torch.stack([one.up for one in weights])
    if isinstance(layer, nn.Conv2d):
        hidden = torch.bmm(down, x.flatten(2).to(down.dtype)) * scales
        return torch.bmm(up, hidden).unflatten(2, x.shape[2:])
    tokens = x.reshape(x.shape[0], -1, x.shape[-1]).to(down.dtype)
    hidden = torch.bmm(tokens, down.transpose(1, 2)) * scales
    return torch.bmm(hidden, up.transpose(1, 2)).reshape(*x.shape[:-1], -1)


def _same_bits(layer: nn.Module, weights: LayerWeights, x: Tensor, count: int) -> bool:
    """Whether rows of a product over so many get the bits that each gets alone."""
    factors = torch.linspace(0.5, 1.5, count, device=x.device, dtype=x.dtype)
    rows = x[:1] * factors.view(-1, *[1] * (x.dim() - 1))
    scales = factors.view(-1, 1, 1)
    together = _product(layer, rows, [weights] * count, scales)
    return all(
        torch.equal(
            together[i : i + 1],
            _product(
                layer, rows.index_select(0, torch.tensor([i], device=x.device)), [weights], scales[i : i + 1]
            ),
        )
        for i in range(count)
    )


def _alone(layer: nn.Module, weights: LayerWeights, row: Tensor) -> Tensor:
    row = row.to(weights.down.dtype)
    if isinstance(layer, nn.Conv2d):
        down = weights.down if weights.down.dim() == 4 else weights.down[:, :, None, None]
        hidden = functional.conv2d(row, down, None, layer.stride, layer.padding, layer.dilation)
        return functional.conv2d(hidden, weights.up[:, :, None, None])
    return functional.linear(functional.linear(row, weights.down), weights.up)


def _magnitude_factor(layer: nn.Module, weights: LayerWeights, weight: float) -> Tensor:
    """What DoRA scales each output of a layer by, shape (out,)."""
    assert weights.magnitude is not None
    base: Any = layer.weight
    changed = base.flatten(1) + weight * (weights.up @ weights.down.flatten(1))
    return weights.magnitude / changed.norm(dim=1)
