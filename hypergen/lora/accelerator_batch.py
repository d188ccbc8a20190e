"""Batched LoRA on an accelerator, where kernels change with the shapes of products.

A round adds one or several LoRAs of every row: a product of each row with the factors of its own LoRAs, or
with zeros if it has fewer. The first round has one LoRA of each row, the next ones three. So no shape depends
on the LoRAs of other rows, and a round takes as long with many LoRAs as with one. A layer takes two kernel
launches a round, and three more gather the factors of all rounds; where all rows have the same single LoRA,
it takes three in all.

A convolution larger than 1 x 1 runs as a grouped one, with a group for each row.

Rows with a LoRA that is more than a product, such as DoRA, run alone.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from hypergen.lora.batched_lora import Loras, add_norm, add_row, has_window
from hypergen.lora.weights import LayerWeights, Lora

# LoRAs of a row in the first round, and in each of the next ones. Most rows have one.
_FIRST, _NEXT = 1, 3


class RowWeights(NamedTuple):
    """The LoRAs of the rows of a batch on the device, as positions in the list of LoRAs, and their weights.

    Attributes:
        positions: int64, shape (n,): for each round, row and LoRA of the round; after the last LoRA where a
            row has fewer.
        weights: float32, shape (n,).
    """

    positions: Tensor
    weights: Tensor


def loras_of(rows: Sequence[Loras]) -> list[Lora]:
    """The LoRAs of a batch, by name."""
    return sorted({lora for own in rows for lora, _ in own}, key=_order)


def _order(lora: Lora) -> tuple[str, int]:
    return lora.name, lora.number


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device, from pinned memory if it is CUDA, so without a wait."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class AcceleratorLoraBatch:
    """The LoRAs of the rows of a batch; forward hooks of the layers call `add`.

    Args:
        rows: the LoRAs of each row, which are summed in the order of their names.
        zeros: by shape and dtype, filled here; to be kept as long as CUDA graphs of batches.
        weights: of an earlier batch with equal rows; None: they are copied to the device, without a wait.

    Attributes:
        loras: of all rows.
        structure: what the kernels of a forward pass depend on, beside the layouts of the LoRAs.
    """

    def __init__(
        self,
        rows: Sequence[Loras],
        device: torch.device,
        zeros: dict[Hashable, Tensor],
        weights: RowWeights | None = None,
    ) -> None:
        self.loras = loras_of(rows)
        self._rows = [tuple(sorted(own, key=lambda entry: _order(entry[0]))) for own in rows]
        self._alone = {row for row, own in enumerate(self._rows) if not all(lora.is_plain for lora, _ in own)}
        self._batched = [() if row in self._alone else own for row, own in enumerate(self._rows)]
        most = max(map(len, self._batched))
        self._rounds = [_FIRST] * (most > 0) + [_NEXT] * math.ceil((most - _FIRST) / _NEXT)
        self._shared = most == 1 and len(self.loras) == 1 and all(self._batched)
        self.structure = tuple(self._rounds), self._shared
        self.weights = weights or self._upload(device)
        self._zeros = zeros

    def _upload(self, device: torch.device) -> RowWeights:
        position = {lora: i for i, lora in enumerate(self.loras)}
        entries = [(position[own[0]], own[1]) if own else (len(self.loras), 0.0) for own in self._entries()]
        positions = _copy(torch.tensor([p for p, _ in entries], dtype=torch.int64), device)
        weights = _copy(torch.tensor([weight for _, weight in entries], dtype=torch.float32), device)
        return RowWeights(positions, weights)

    def _entries(self) -> Iterator[tuple[Lora, float] | None]:
        """The LoRAs of the rows that do not run alone, round by round; None where a row has fewer."""
        start = 0
        for width in self._rounds:
            for own in self._batched:
                found = own[start : start + width]
                yield from (*found, *[None] * (width - len(found)))
            start += width

    def with_slots(self, slots: Sequence[Lora], weights: RowWeights) -> AcceleratorLoraBatch:
        """The same batch, with factors and weights at addresses that a CUDA graph can read."""
        batch = copy.copy(self)
        batch.loras, batch.weights = list(slots), weights
        return batch

    def add(self, layer: nn.Module, name: str, x: Tensor, output: Tensor) -> None:
        """Add the LoRAs' changes of the layer's output, in place.

        Args:
            x: the layer's input.
        """
        if x.shape[0] != len(self._rows):
            raise RuntimeError(f"{name} has {x.shape[0]} input rows, but the batch has {len(self._rows)}.")
        factors = {i: lora.layers[name] for i, lora in enumerate(self.loras) if name in lora.layers}
        self._add_products(layer, {i: each for i, each in factors.items() if each.is_plain}, x, output)
        for row in self._alone:
            for lora, weight in self._rows[row]:
                if (own := lora.layers.get(name)) is not None:
                    add_row(layer, own, row, weight, x, output)
                if (norm := lora.norms.get(name)) is not None:
                    add_norm(layer, norm, row, weight, x, output)

    def _add_products(
        self, layer: nn.Module, factors: Mapping[int, LayerWeights], x: Tensor, output: Tensor
    ) -> None:
        by_rank: defaultdict[int, dict[int, LayerWeights]] = defaultdict(dict)
        for position, each in factors.items():
            by_rank[each.rank][position] = each
        rows = len(self._rows)
        if has_window(layer):
            x = x.contiguous()  # a copy if it is channels last
        for batch in by_rank.values():
            if self._shared:
                _add_products(layer, *self._share(batch[0]), x, output)
                continue
            down, up = self._gather(batch)
            start = 0
            for count in self._rounds:
                end = start + rows * count
                own_down, own_up = (
                    each[start:end].unflatten(0, (rows, count)).flatten(1, 2) for each in (down, up)
                )
                _add_products(layer, own_down, own_up, x, output)
                start = end

    def _gather(self, batch: Mapping[int, LayerWeights]) -> tuple[Tensor, Tensor]:
        """Factors in the order of `RowWeights.positions`, `down` scaled.

        Zeros where there is no LoRA of this rank. Shapes (n, rank, in), or (n, rank, in * kh * kw), and
        (n, rank, out).
        """
        joint = {position: each.joint for position, each in batch.items() if each.joint is not None}
        zeros = self._zeros_like(next(iter(joint.values())))
        of_loras = torch.stack([joint.get(position, zeros) for position in range(len(self.loras) + 1)])
        gathered = of_loras.index_select(0, self.weights.positions)
        width = next(iter(batch.values())).width
        return self._scaled(gathered[..., :width]), gathered[..., width:]

    def _share(self, weights: LayerWeights) -> tuple[Tensor, Tensor]:
        """The factors of a LoRA that all rows have, with the strides of gathered ones."""
        assert weights.joint is not None
        down, up = weights.joint[:, : weights.width], weights.joint[:, weights.width :]
        return self._scaled(down), up.expand(len(self._rows), *up.shape)

    def _scaled(self, down: Tensor) -> Tensor:
        weights = self.weights.weights.view(-1, 1, 1)
        return torch.mul(down, weights, out=down.new_empty(len(weights), *down.shape[-2:]))

    def _zeros_like(self, factor: Tensor) -> Tensor:
        key = factor.shape, factor.dtype
        if key not in self._zeros:
            self._zeros[key] = torch.zeros_like(factor)
        return self._zeros[key]


def _add_products(layer: nn.Module, down: Tensor, up: Tensor, x: Tensor, output: Tensor) -> None:
    """Add each row's product with its factors.

    Args:
        down: shape (rows, n, in), or (rows, n, in * kh * kw), contiguous.
        up: shape (rows, n, out).
    """
    rows = len(down)
    if isinstance(layer, nn.Conv2d):
        hidden = _convolve(layer, down, x) if has_window(layer) else torch.bmm(down, x.flatten(2))
        output.view(rows, up.shape[2], -1).baddbmm_(up.transpose(1, 2), hidden)
    else:
        hidden = torch.bmm(x.reshape(rows, -1, x.shape[-1]), down.transpose(1, 2))
        output.view(rows, -1, up.shape[2]).baddbmm_(hidden, up)


def _convolve(layer: nn.Conv2d, down: Tensor, x: Tensor) -> Tensor:
    """The layer's convolution with other weights for each row, shape (rows, n, pixels).

    Args:
        down: shape (rows, n, in * kh * kw).
        x: contiguous.
    """
    rows, _, height, width = x.shape
    weight = down.view(-1, layer.in_channels, *layer.kernel_size)
    hidden = functional.conv2d(
        x.view(1, -1, height, width),
        weight,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=rows,
    )
    return hidden.view(rows, down.shape[1], -1)
