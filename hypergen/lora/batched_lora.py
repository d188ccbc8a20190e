"""Batched LoRA: each row of a forward pass has its own LoRAs with their weights.

Base weights never change. On a CPU only rows with a LoRA are multiplied and added to. Matrix products run
over several rows at once, in batch sizes that were probed on the layer's shape and gave each row the bits
that it gets alone. Convolutions larger than 1 x 1 run row by row.

DoRA, changed biases and changed norms run row by row. `accelerator_batch.py` has the batches of accelerators.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from hypergen.lora.weights import LayerWeights, Lora, NormWeights

# The LoRAs of one row with their weights, in the order in which they are summed.
Loras = tuple[tuple[Lora, float], ...]

# Few batch sizes, so that few are probed; the largest first.
_BATCH_SIZES = (16, 8, 4, 2)


class _Entry(NamedTuple):
    row: int
    lora: Lora
    weight: float


class LoraBatch:
    """The LoRAs of the rows of a batch; forward hooks of the layers call `add`.

    Args:
        loras: of each row.
    """

    def __init__(self, loras: Sequence[Loras], batch_sizes: BatchSizeProbe) -> None:
        self.loras = {lora for own in loras for lora, _ in own}
        self._rows = len(loras)
        self._batch_sizes = batch_sizes
        # Round i has the i-th LoRA of every row: each row sums its LoRAs in its own order.
        self._rounds = [
            [_Entry(row, *own[i]) for row, own in enumerate(loras) if i < len(own)]
            for i in range(max(map(len, loras)))
        ]
        self._tensors: dict[tuple[tuple[int, float], ...], tuple[Tensor, Tensor]] = {}

    def add(self, layer: nn.Module, name: str, x: Tensor, output: Tensor) -> None:
        """Add the LoRAs' changes of the layer's output, in place.

        Args:
            x: the layer's input.
        """
        if x.shape[0] != self._rows:
            raise RuntimeError(f"{name} has {x.shape[0]} input rows, but the batch has {self._rows}.")
        for entries in self._rounds:
            self._add_round(layer, name, entries, x, output)
            for row, lora, weight in entries:
                if (norm := lora.norms.get(name)) is not None:
                    add_norm(layer, norm, row, weight, x, output)

    def _add_round(
        self, layer: nn.Module, name: str, entries: list[_Entry], x: Tensor, output: Tensor
    ) -> None:
        by_rank: dict[int, list[_Entry]] = {}
        for entry in entries:
            weights = entry.lora.layers.get(name)
            if weights is None:
                continue
            if not weights.is_plain or has_window(layer):
                add_row(layer, weights, entry.row, entry.weight, x, output)
            else:
                by_rank.setdefault(weights.rank, []).append(entry)
        for batch in by_rank.values():
            self._add_batch(layer, name, batch, x, output)

    def _add_batch(
        self, layer: nn.Module, name: str, entries: list[_Entry], x: Tensor, output: Tensor
    ) -> None:
        first = entries[0].lora.layers[name]
        # Layers of the same shape run the same kernel.
        shape = type(layer), x.shape[1:], x.dtype, first.down.shape, first.up.shape
        position = 0
        while position < len(entries):
            remaining = len(entries) - position
            size = self._batch_sizes.largest(shape, remaining, lambda size: _same_bits(layer, first, x, size))
            batch = entries[position : position + size]
            rows, scales = self._on_device(batch, x)
            added = _product(layer, x.index_select(0, rows), [e.lora.layers[name] for e in batch], scales)
            output.index_add_(0, rows, added.to(output.dtype))
            position += size

    def _on_device(self, batch: list[_Entry], x: Tensor) -> tuple[Tensor, Tensor]:
        """Row indices and LoRA weights as tensors, cached: all layers use the same few."""
        key = tuple((entry.row, entry.weight) for entry in batch)
        if key not in self._tensors:
            rows = torch.tensor([entry.row for entry in batch], device=x.device)
            scales = torch.tensor([entry.weight for entry in batch], device=x.device, dtype=x.dtype)
            self._tensors[key] = rows, scales.view(-1, 1, 1)
        return self._tensors[key]


class BatchSizeProbe:
    """The batch sizes at which a LoRA product is bit-exact, probed once per shape of layer and input.

    Args:
        strict: False: allow every batch size without a probe.
    """

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._probed: dict[tuple[Hashable, int], bool] = {}

    def largest(self, shape: Hashable, rows: int, probe: Callable[[int], bool]) -> int:
        """The largest allowed batch size of at most `rows`.

        Args:
            shape: of the layer, its LoRA factors and its input.
            probe: whether a batch of this size is bit-exact.
        """
        for size in _BATCH_SIZES:
            if size <= rows and self._is_exact(shape, size, probe):
                return size
        return 1

    def _is_exact(self, shape: Hashable, size: int, probe: Callable[[int], bool]) -> bool:
        if self._strict and (shape, size) not in self._probed:
            self._probed[shape, size] = probe(size)
        return not self._strict or self._probed[shape, size]


def has_window(layer: nn.Module) -> bool:
    """Whether the layer is a convolution that is more than a matrix product for each pixel."""
    return isinstance(layer, nn.Conv2d) and (
        layer.kernel_size != (1, 1) or layer.stride != (1, 1) or layer.padding not in ((0, 0), "valid")
    )


def _product(layer: nn.Module, x: Tensor, weights: Sequence[LayerWeights], scales: Tensor) -> Tensor:
    """`up(down(x))` of each row with its own LoRA.

    Args:
        x: one row per entry of `weights`.
        scales: shape (rows, 1, 1).
    """
    down = torch.stack([w.down for w in weights])
    scales = scales.to(down.dtype)
    up = torch.stack([w.up for w in weights])
    if isinstance(layer, nn.Conv2d):
        hidden = torch.bmm(down, x.flatten(2).to(down.dtype)) * scales
        return torch.bmm(up, hidden).unflatten(2, x.shape[2:])
    tokens = x.reshape(x.shape[0], -1, x.shape[-1]).to(down.dtype)
    hidden = torch.bmm(tokens, down.transpose(1, 2)) * scales
    return torch.bmm(hidden, up.transpose(1, 2)).reshape(*x.shape[:-1], -1)


def _same_bits(layer: nn.Module, weights: LayerWeights, x: Tensor, count: int) -> bool:
    """Whether each of `count` rows gets the bits in one product that it gets alone."""
    factors = torch.linspace(0.5, 1.5, count, device=x.device, dtype=x.dtype)
    rows = x[:1] * factors.view(-1, *[1] * (x.dim() - 1))
    scales = factors.view(-1, 1, 1)
    batched = _product(layer, rows, [weights] * count, scales)
    return all(
        torch.equal(
            batched[i : i + 1],
            _product(
                layer, rows.index_select(0, torch.tensor([i], device=x.device)), [weights], scales[i : i + 1]
            ),
        )
        for i in range(count)
    )


def add_row(
    layer: nn.Module, weights: LayerWeights, row: int, weight: float, x: Tensor, output: Tensor
) -> None:
    """Add the LoRA's change of one row of the layer's output, in place.

    Args:
        x: the layer's input, of all rows.
    """
    own, result = x[row : row + 1].contiguous(), output[row : row + 1]
    if weights.magnitude is None:
        added = weight * _row_product(layer, weights, own)
    else:
        added = _dora_change(layer, weights, weight, own, result)
    if weights.bias is not None:
        added = added + weight * _of_channels(layer, weights.bias)
    result += added.to(result.dtype)


def add_norm(layer: nn.Module, norm: NormWeights, row: int, weight: float, x: Tensor, output: Tensor) -> None:
    """Add the LoRA's change of one row of a normalization layer's output, in place; see `add_row`."""
    output[row : row + 1] += weight * _normalized(layer, norm, x[row : row + 1])


def _project_down(layer: nn.Module, weights: LayerWeights, x: Tensor) -> Tensor:
    x = x.to(weights.down.dtype)
    if isinstance(layer, nn.Conv2d):
        down = weights.down if weights.down.dim() == 4 else weights.down[:, :, None, None]
        return functional.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
    return functional.linear(x, weights.down)


def _row_product(layer: nn.Module, weights: LayerWeights, row: Tensor) -> Tensor:
    hidden = _project_down(layer, weights, row)
    if isinstance(layer, nn.Conv2d):
        return functional.conv2d(hidden, weights.up[:, :, None, None])
    return functional.linear(hidden, weights.up)


def _dora_change(
    layer: nn.Module, weights: LayerWeights, weight: float, row: Tensor, result: Tensor
) -> Tensor:
    """What DoRA adds to the output `result` of one row, whose own weights it scales too, but not the bias."""
    if weights.magnitude_of_inputs:
        factor = _of_channels(layer, _magnitude_factor(layer, weights, weight))
        added = weight * _row_product(layer, weights, factor * row)
        return added + _own_product(layer, (factor - 1) * row)
    factor = _of_channels(layer, _magnitude_factor(layer, weights, weight))
    bias: Any = layer.bias
    base = result if bias is None else result - _of_channels(layer, bias)
    return (factor - 1) * base + factor * weight * _row_product(layer, weights, row)


def _magnitude_factor(layer: nn.Module, weights: LayerWeights, weight: float) -> Tensor:
    """DoRA's scale of each output of a layer, shape (out,), or of each input, shape (in,)."""
    assert weights.magnitude is not None
    base = _dense_weight(layer)
    merged = base.flatten(1) + weight * (weights.up @ weights.down.flatten(1))
    if weights.magnitude_of_inputs:
        return weights.magnitude / merged.unflatten(1, (base.shape[1], -1)).norm(dim=(0, 2))
    return weights.magnitude / merged.norm(dim=1)


def _own_product(layer: Any, x: Tensor) -> Tensor:
    """The layer's output without its bias."""
    weight = _dense_weight(layer)
    if isinstance(layer, nn.Conv2d):
        return functional.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)
    return functional.linear(x, weight)


def _dense_weight(layer: Any) -> Tensor:
    """The weight; a CPU's engine may have reordered it, see hypergen/engine/reordered_weights.py."""
    return layer.weight.to_dense() if layer.weight.is_mkldnn else layer.weight


def _of_channels(layer: nn.Module, values: Tensor) -> Tensor:
    """One value per channel, shaped to be broadcast over the layer's input or output."""
    return values.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else values


def _normalized(layer: nn.Module, norm: NormWeights, x: Tensor) -> Tensor:
    """The output of a normalization layer with the weight and the bias of a LoRA."""
    if isinstance(layer, nn.GroupNorm):
        return functional.group_norm(x, layer.num_groups, norm.weight, norm.bias, layer.eps)
    if isinstance(layer, nn.LayerNorm):
        return functional.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, layer.eps)
    assert isinstance(layer, nn.RMSNorm)
    return functional.rms_norm(x, norm.weight.shape, norm.weight, layer.eps) + norm.bias
