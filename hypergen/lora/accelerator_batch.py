"""Batched LoRA on an accelerator, where kernels change with the row count.

Each LoRA of a batch runs over all of its rows, scaled by 0 in those that do not have it. So the shape of a
product never depends on the LoRAs of other rows. A layer takes two kernel launches for each LoRA, and two for
the weights of all: three where every row has the only LoRA, six for two different ones.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from hypergen.lora.batched_lora import Loras, add_row, project_down
from hypergen.lora.weights import LayerWeights, Lora

# Elements, at least 256 bytes: kernels are also chosen by the alignment of their inputs.
_ALIGNMENT = 256


class RowWeights(NamedTuple):
    """The weights of the LoRAs of a batch on the device.

    Attributes:
        scales: float32, shape (LoRAs, rows); 0 where a row does not have the LoRA.
        without: where `scales` is 0; None: nowhere.
    """

    scales: Tensor
    without: Tensor | None


def loras_of(rows: Sequence[Loras]) -> list[Lora]:
    """The LoRAs of a batch by name: an order for their sum that is the order of every row."""
    return sorted({lora for own in rows for lora, _ in own}, key=lambda lora: (lora.name, lora.number))


def upload_weights(loras: Sequence[Lora], rows: Sequence[Loras], device: torch.device) -> RowWeights:
    """Copy the weights of a batch to the device, without a wait."""
    own = [dict(row) for row in rows]
    weights = torch.tensor([[row.get(lora, 0.0) for row in own] for lora in loras], dtype=torch.float32)
    complete = bool(weights.all())
    if device.type == "cuda":
        weights = weights.pin_memory()
    scales = weights.to(device, non_blocking=device.type == "cuda")
    return RowWeights(scales, None if complete else scales == 0)


class AcceleratorLoraBatch:
    """The LoRAs of the rows of a batch; forward hooks of the layers call `add`.

    Args:
        loras: in the order in which they are summed.
        weights: of all rows.
        rows: the LoRAs of each row; only DoRA needs them.
    """

    def __init__(self, loras: Sequence[Lora], weights: RowWeights, rows: Sequence[Loras] = ()) -> None:
        self.loras = loras
        self.weights = weights
        self._rows = rows

    def add(self, layer: nn.Module, name: str, x: Tensor, output: Tensor) -> None:
        """Add the LoRA products of the layer's input `x` to its output, in place."""
        rows = self.weights.scales.shape[1]
        if x.shape[0] != rows:
            raise RuntimeError(f"{name} has {x.shape[0]} input rows, but the batch has {rows}.")
        factors = {i: lora.layers[name] for i, lora in enumerate(self.loras) if name in lora.layers}
        hidden = self._project_down(layer, factors, x)
        for i, layer_weights in factors.items():
            if layer_weights.magnitude is None:
                _add_projected_up(layer, layer_weights, hidden[i], output)
                continue
            for row, own in enumerate(self._rows):
                if (weight := dict(own).get(self.loras[i])) is not None:
                    add_row(layer, layer_weights, row, weight, x, output)

    def _project_down(
        self, layer: nn.Module, factors: Mapping[int, LayerWeights], x: Tensor
    ) -> dict[int, Tensor]:
        """`down(x)` of all rows, times their weights, for each LoRA but DoRAs."""
        by_rank: defaultdict[int, list[int]] = defaultdict(list)
        for i, weights in factors.items():
            if weights.magnitude is None:
                by_rank[weights.rank].append(i)
        hidden: dict[int, Tensor] = {}
        for indices in by_rank.values():
            products = _weighted_products(layer, [factors[i] for i in indices], x, self._weights_of(indices))
            hidden |= zip(indices, products, strict=True)
        return hidden

    def _weights_of(self, indices: list[int]) -> RowWeights:
        def select(tensor: Tensor) -> Tensor:
            first, last = indices[0], indices[-1]
            if last - first + 1 == len(indices):
                return tensor[first : last + 1]
            return torch.stack([tensor[i] for i in indices])

        scales, without = self.weights
        return RowWeights(select(scales), None if without is None else select(without))


def _weighted_products(
    layer: nn.Module, factors: Sequence[LayerWeights], x: Tensor, weights: RowWeights
) -> Tensor:
    """`down(x)` times the weights of the rows for LoRAs of one rank, shape (LoRAs, *down(x).shape)."""
    x = x.to(factors[0].down.dtype)
    columns = (len(factors), x.shape[0], *[1] * (x.dim() - 1))
    scales = weights.scales.view(columns)
    if isinstance(layer, nn.Conv2d):
        first = project_down(layer, factors[0], x)
        hidden = _aligned(len(factors), first.shape, first)
        torch.mul(first, scales[0], out=hidden[0])
        for i, each in enumerate(factors[1:], 1):
            torch.mul(project_down(layer, each, x), scales[i], out=hidden[i])
    else:
        hidden = _aligned(len(factors), (*x.shape[:-1], factors[0].rank), x)
        tokens = x.reshape(-1, x.shape[-1])
        for each, product in zip(factors, hidden, strict=True):
            torch.mm(tokens, each.down.T, out=product.view(len(tokens), -1))
        hidden.mul_(scales)
    if weights.without is not None:  # 0 times infinity would be NaN, of a row that does not have the LoRA
        hidden.masked_fill_(weights.without.view(columns), 0)
    return hidden


def _aligned(count: int, shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory for `count` tensors, at addresses that are aligned whatever their count."""
    size = math.prod(shape)
    padded = math.ceil(size / _ALIGNMENT) * _ALIGNMENT
    return like.new_empty(count, padded)[:, :size].unflatten(1, shape)


def _add_projected_up(layer: nn.Module, weights: LayerWeights, hidden: Tensor, output: Tensor) -> None:
    up = weights.up
    if not isinstance(layer, nn.Conv2d):
        if output.is_contiguous() and output.dtype == hidden.dtype:
            output.view(-1, output.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), up.T)
        else:
            output += functional.linear(hidden, up).to(output.dtype)
        return
    pixels = hidden.flatten(2)  # shape (rows, rank, pixels)
    if output.is_contiguous() and output.dtype == hidden.dtype:
        output.flatten(2).baddbmm_(up.expand(len(output), -1, -1), pixels)
    elif output.is_contiguous(memory_format=torch.channels_last) and output.dtype == hidden.dtype:
        by_pixel = output.permute(0, 2, 3, 1).flatten(1, 2)
        by_pixel.baddbmm_(pixels.transpose(1, 2), up.T.expand(len(output), -1, -1))
    else:
        output += functional.conv2d(hidden, up[:, :, None, None]).to(output.dtype)
