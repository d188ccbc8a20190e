"""Batched LoRA on an accelerator, where kernels change with the shapes of products.

Round i adds the i-th LoRA of every row: a product of each row with the factors of its own LoRA, or with zeros
if it has none. So no shape depends on the LoRAs of other rows, and a round takes as long with many LoRAs as
with one. A layer takes three kernel launches a round. Where not all rows have the same LoRA, four more gather
the factors of all rounds.

Convolutions larger than 1 x 1 cannot differ by row. There each LoRA of the batch runs over all rows, scaled
by 0 in those that do not have it.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hypergen.lora.batched_lora import Loras, add_norm, add_row, has_window, project_down
from hypergen.lora.weights import LayerWeights, Lora

# Elements, at least 256 bytes: kernels are also chosen by the alignment of their inputs.
_ALIGNMENT = 256

# Shapes (rows, rank, in) and (rows, out, rank).
_Factors = tuple[Tensor, Tensor]


class RowWeights(NamedTuple):
    """The LoRAs of the rows of a batch on the device, as positions in the list of LoRAs, and their weights.

    Attributes:
        positions: int64, shape (rounds * rows,); after the last LoRA where a row has fewer than others.
        weights: float32, shape (rounds, rows).
        of_loras: float32, shape (LoRAs, rows); 0 where a row does not have the LoRA.
        without: where `of_loras` is 0; None: nowhere.
    """

    positions: Tensor
    weights: Tensor
    of_loras: Tensor
    without: Tensor | None = None


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
        shared: for each round the position of the LoRA that all rows have, or None.
    """

    def __init__(
        self,
        rows: Sequence[Loras],
        device: torch.device,
        zeros: dict[Hashable, Tensor],
        weights: RowWeights | None = None,
    ) -> None:
        self.loras = loras_of(rows)
        self._rows = [sorted(own, key=lambda entry: _order(entry[0])) for own in rows]
        position = {lora: i for i, lora in enumerate(self.loras)}
        rounds = range(max(map(len, rows)))
        self._positions = [
            [position[own[i][0]] if i < len(own) else len(self.loras) for own in self._rows] for i in rounds
        ]
        self.shared = tuple(
            row[0] if len(set(row)) == 1 and row[0] < len(self.loras) else None for row in self._positions
        )
        self.weights = weights or self._upload(device)
        self._zeros = zeros

    def _upload(self, device: torch.device) -> RowWeights:
        by_round = [
            [own[i][1] if i < len(own) else 0.0 for own in self._rows] for i in range(len(self._positions))
        ]
        by_lora = [
            [sum(weight for lora, weight in own if lora is each) for own in self._rows] for each in self.loras
        ]
        weights = _copy(torch.tensor([*by_round, *by_lora], dtype=torch.float32), device)
        of_loras = weights[len(by_round) :]
        without = None if all(map(all, by_lora)) else of_loras == 0
        positions = _copy(torch.tensor(self._positions).flatten(), device)
        return RowWeights(positions, weights[: len(by_round)], of_loras, without)

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
        norms = {i: lora.norms[name] for i, lora in enumerate(self.loras) if name in lora.norms}
        plain = {i: each for i, each in factors.items() if each.is_plain}
        if has_window(layer):
            self._add_convolutions(layer, plain, x, output)
        products = {} if has_window(layer) else self._factors_of_rows(plain)
        for i, positions in enumerate(self._positions):
            for down, up in products.get(i, ()):
                _add_products(layer, down, up, self.weights.weights[i].view(-1, 1, 1), x, output)
            for row, position in enumerate(positions):
                if position in factors.keys() - plain.keys():
                    add_row(layer, factors[position], row, self._rows[row][i][1], x, output)
                if position in norms:
                    add_norm(layer, norms[position], row, self._rows[row][i][1], x, output)

    def _factors_of_rows(self, factors: Mapping[int, LayerWeights]) -> Mapping[int, list[_Factors]]:
        """For each round the factors of its rows, with a pair for each rank."""
        by_rank: defaultdict[int, dict[int, LayerWeights]] = defaultdict(dict)
        for position, each in factors.items():
            by_rank[each.rank][position] = each
        rounds: defaultdict[int, list[_Factors]] = defaultdict(list)
        for batch in by_rank.values():
            gathered = None
            for i, shared in enumerate(self.shared):
                if shared in batch:
                    down, up = batch[shared].down, batch[shared].up
                    rows = len(self._rows)
                    rounds[i].append((down.expand(rows, -1, -1), up.expand(rows, -1, -1)))
                elif shared is None:
                    gathered = gathered or self._gather(batch)
                    rounds[i].append((gathered[0][i], gathered[1][i]))
        return rounds

    def _gather(self, batch: Mapping[int, LayerWeights]) -> _Factors:
        """The factors of all rounds and rows, with zeros where a row has no LoRA of this rank in a round."""

        def gather(factors: dict[int, Tensor]) -> Tensor:
            zeros = self._zeros_like(next(iter(factors.values())))
            of_loras = [factors.get(position, zeros) for position in range(len(self.loras) + 1)]
            of_rows = torch.stack(of_loras).index_select(0, self.weights.positions)
            return of_rows.unflatten(0, (len(self._positions), -1))

        return gather({i: w.down for i, w in batch.items()}), gather({i: w.up for i, w in batch.items()})

    def _zeros_like(self, factor: Tensor) -> Tensor:
        key = factor.shape, factor.dtype
        if key not in self._zeros:
            self._zeros[key] = torch.zeros_like(factor)
        return self._zeros[key]

    def _add_convolutions(
        self, layer: nn.Module, factors: Mapping[int, LayerWeights], x: Tensor, output: Tensor
    ) -> None:
        by_rank: defaultdict[int, list[int]] = defaultdict(list)
        for position, each in factors.items():
            by_rank[each.rank].append(position)
        for positions in by_rank.values():
            hidden = self._weighted_convolutions(layer, {i: factors[i] for i in positions}, x)
            for i, product in zip(positions, hidden, strict=True):
                up = factors[i].up.expand(len(self._rows), -1, -1)
                output.view(*output.shape[:2], -1).baddbmm_(up, product.flatten(2))

    def _weighted_convolutions(
        self, layer: nn.Module, factors: Mapping[int, LayerWeights], x: Tensor
    ) -> Tensor:
        """`down(x)` times the weights of the rows, for LoRAs of one rank, shape (LoRAs, rows, rank, h, w)."""
        hidden = None
        for i, (position, each) in enumerate(factors.items()):
            product = project_down(layer, each, x)
            if hidden is None:
                hidden = _aligned(len(factors), product)
            torch.mul(product, self.weights.of_loras[position].view(-1, 1, 1, 1), out=hidden[i])
        assert hidden is not None
        # 0 times infinity would be NaN, of a row that does not have the LoRA.
        if (without := self.weights.without) is None:
            return hidden
        if len(factors) == len(self.loras):
            return hidden.masked_fill_(without[..., None, None, None], 0)
        for position, product in zip(factors, hidden, strict=True):
            product.masked_fill_(without[position].view(-1, 1, 1, 1), 0)
        return hidden


def _add_products(
    layer: nn.Module, down: Tensor, up: Tensor, weights: Tensor, x: Tensor, output: Tensor
) -> None:
    """Add each row's product with its factors.

    Args:
        weights: shape (rows, 1, 1).
    """
    rows = len(down)
    if isinstance(layer, nn.Conv2d):
        hidden = torch.bmm(down, x.flatten(2)).mul_(weights)
        output.view(rows, up.shape[1], -1).baddbmm_(up, hidden)
    else:
        hidden = torch.bmm(x.reshape(rows, -1, x.shape[-1]), down.transpose(1, 2)).mul_(weights)
        output.view(rows, -1, up.shape[1]).baddbmm_(hidden, up.transpose(1, 2))


def _aligned(count: int, like: Tensor) -> Tensor:
    """Memory for `count` tensors, at addresses that are aligned whatever their count."""
    padded = math.ceil(like.numel() / _ALIGNMENT) * _ALIGNMENT
    return like.new_empty(count, padded)[:, : like.numel()].unflatten(1, like.shape)
