"""Batched LoRA on an accelerator, where kernels change with the shapes of products.

A LoRA's factors are divided into segments of rank `--max-lora-rank`. A product adds all LoRAs of a row to a
layer's output; it has 1, 4, 16 or more segments, so no shape depends on the LoRAs of other rows. Each size
that a batch has runs over all its rows, with zeros in those of other sizes: two kernel launches, and three
more gather the factors of all sizes. With two sizes, the most that the scheduler puts into a batch, it is
seven launches a layer; where all rows have the same single LoRA, it is three.

A convolution larger than 1 x 1 runs as a grouped one, with a group for each row.

Rows with a LoRA that is more than a product, such as DoRA, and all rows in text encoders run alone.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from hypergen.lora.batched_lora import Loras, add_norm, add_row, has_window
from hypergen.lora.slots import product_size
from hypergen.lora.weights import LayerWeights, Lora, in_text_encoder

# Of the gathered factors of a product; larger ones are gathered for some rows at a time.
_MOST_BYTES = 2**28

# How many segments each LoRA of a batch has in a layer.
_Counts = tuple[int, ...]


class RowWeights(NamedTuple):
    """The LoRAs of the rows of a batch on the device.

    Attributes:
        positions: int64, shape (n,): for all `_Counts`, one after another: for each size, row and segment of
            the size, a segment among those of all LoRAs in a layer; after the last one where a row has fewer.
        weights: float32, shape (n,); shape (rows,) where all rows have the same single LoRA.
    """

    positions: Tensor
    weights: Tensor


class _Products(NamedTuple):
    """The products of layers in which the LoRAs have the same numbers of segments.

    Attributes:
        sizes: in segments.
        start: in `RowWeights`.
    """

    sizes: tuple[int, ...]
    start: int


class RowLoras(NamedTuple):
    """What the rows of a batch have, without the LoRAs themselves.

    Attributes:
        counts: by layer, where a LoRA has segments.
    """

    weights: RowWeights
    counts: dict[str, _Counts]
    products: dict[_Counts, _Products]


def loras_of(rows: Sequence[Loras]) -> list[Lora]:
    """The LoRAs of a batch, by name."""
    return sorted({lora for own in rows for lora, _ in own}, key=_order)


def product_sizes(loras: Loras) -> frozenset[int]:
    """The sizes of a row's products in all layers, in segments; on a CPU none."""
    if not all(lora.is_plain for lora, _ in loras):
        return frozenset()
    counts: Counter[str] = Counter()
    for lora, _ in loras:
        counts.update({layer: weights.segment_count for layer, weights in lora.layers.items()})
    return frozenset(product_size(count) for count in counts.values() if count)


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
        row_loras: of an earlier batch with equal rows; None: they are copied to the device, without a wait.

    Attributes:
        loras: of all rows.
        structure: what the kernels of a forward pass depend on, beside the layouts of the LoRAs.
    """

    def __init__(
        self,
        rows: Sequence[Loras],
        device: torch.device,
        zeros: dict[Hashable, Tensor],
        row_loras: RowLoras | None = None,
    ) -> None:
        self.loras = loras_of(rows)
        self._rows = [tuple(sorted(own, key=lambda entry: _order(entry[0]))) for own in rows]
        self._alone = {row for row, own in enumerate(self._rows) if not all(lora.is_plain for lora, _ in own)}
        self._batched = [() if row in self._alone else own for row, own in enumerate(self._rows)]
        self._shared = len(self.loras) == 1 and all(self._batched)
        self.row_loras = row_loras or self._upload(device)
        self.structure = self._shared, tuple(self.row_loras.products.items())
        self._zeros = zeros

    def _upload(self, device: torch.device) -> RowLoras:
        counts = {layer: self._counts(layer) for lora in self.loras for layer in lora.layers}
        counts = {layer: own for layer, own in counts.items() if any(own)}
        entries: list[tuple[int, float]] = []
        products: dict[_Counts, _Products] = {}
        if self._shared:
            entries = [(0, weight) for own in self._batched for _, weight in own]
        else:
            for own in sorted(set(counts.values())):
                sizes, added = self._entries(own)
                products[own] = _Products(sizes, len(entries))
                entries += added
        positions = _copy(torch.tensor([p for p, _ in entries], dtype=torch.int64), device)
        weights = _copy(torch.tensor([weight for _, weight in entries], dtype=torch.float32), device)
        return RowLoras(RowWeights(positions, weights), counts, products)

    def _counts(self, layer: str) -> _Counts:
        return tuple(lora.layers[layer].segment_count if layer in lora.layers else 0 for lora in self.loras)

    def _entries(self, counts: _Counts) -> tuple[tuple[int, ...], list[tuple[int, float]]]:
        """The sizes of the rows' products, and positions and weights for `RowWeights`."""
        first = dict(zip(self.loras, itertools.accumulate(counts, initial=0), strict=False))
        count = dict(zip(self.loras, counts, strict=True))
        rows = [
            [(first[lora] + i, weight) for lora, weight in own for i in range(count[lora])]
            for own in self._batched
        ]
        sizes = sorted({product_size(len(own)) for own in rows if own})
        entries: list[tuple[int, float]] = []
        for size in sizes:
            for own in rows:
                present = own if product_size(len(own)) == size else []
                entries += present + [(sum(counts), 0.0)] * (size - len(present))
        return tuple(sizes), entries

    def with_slots(self, slots: Sequence[Lora], weights: RowWeights) -> AcceleratorLoraBatch:
        """The same batch, with factors and weights at addresses that a CUDA graph can read."""
        batch = copy.copy(self)
        batch.loras, batch.row_loras = list(slots), self.row_loras._replace(weights=weights)
        return batch

    def add(self, layer: nn.Module, name: str, x: Tensor, output: Tensor) -> None:
        """Add the LoRAs' changes of the layer's output, in place.

        Args:
            x: the layer's input.
        """
        if x.shape[0] != len(self._rows):
            raise RuntimeError(f"{name} has {x.shape[0]} input rows, but the batch has {len(self._rows)}.")
        for rows, down, up in self._factors(name):
            if has_window(layer):
                x = x.contiguous()  # a copy if it is channels last
            _add_products(layer, down, up, x[rows], output[rows])
        for row in range(len(self._rows)) if in_text_encoder(name) else self._alone:
            for lora, weight in self._rows[row]:
                if (own := lora.layers.get(name)) is not None:
                    add_row(layer, own, row, weight, x, output)
                if (norm := lora.norms.get(name)) is not None:
                    add_norm(layer, norm, row, weight, x, output)

    def _factors(self, layer: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, their `down` with the weights, and their `up`, of each size; see `_add_products`."""
        counts = self.row_loras.counts.get(layer)
        if counts is None:
            return
        loras = [lora.layers[layer] for lora, count in zip(self.loras, counts, strict=True) if count]
        if self._shared:
            yield from self._share(loras[0])
        else:
            yield from self._gather(loras, *self.row_loras.products[counts])

    def _share(self, lora: LayerWeights) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The factors of a LoRA that all rows have, with the strides of gathered ones."""
        assert lora.joint is not None
        down, up = lora.joint.flatten(0, 1).tensor_split([lora.width], dim=1)
        for rows in self._row_slices(len(lora.joint), lora):
            weights = self.row_loras.weights.weights[rows]
            yield rows, _scaled(down, weights), up.expand(len(weights), -1, -1)

    def _gather(
        self, loras: Sequence[LayerWeights], sizes: Sequence[int], start: int
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        segments = [lora.segments for lora in loras if lora.segments is not None]
        table = torch.cat([*segments, self._zero_segment(segments[0])])
        products = [(size, rows) for size in sizes for rows in self._row_slices(size, loras[0])]
        # One gathers all, unless that is too large.
        groups = [products] if len(products) == len(sizes) else [[product] for product in products]
        for group in groups:
            lengths = [size * (rows.stop - rows.start) for size, rows in group]
            span = slice(start, start := start + sum(lengths))
            gathered = table.index_select(0, self.row_loras.weights.positions[span])
            down, up = gathered.tensor_split([loras[0].width], dim=2)
            down = _scaled(down, self.row_loras.weights.weights[span])
            for (size, rows), *factors in zip(group, down.split(lengths), up.split(lengths), strict=True):
                own_down, own_up = (each.unflatten(0, (-1, size)).flatten(1, 2) for each in factors)
                yield rows, own_down, own_up

    def _row_slices(self, size: int, lora: LayerWeights) -> list[slice]:
        """All rows, or slices of them if the factors of all would be too large for the memory.

        They depend on nothing but the size, so a row's product always has the same shape.
        """
        assert lora.joint is not None
        rows = len(self._rows)
        count = max(1, _MOST_BYTES // (size * lora.joint[0].nbytes))
        return [slice(first, min(first + count, rows)) for first in range(0, rows, count)]

    def _zero_segment(self, segments: Tensor) -> Tensor:
        key = segments.shape[1:], segments.dtype
        if key not in self._zeros:
            self._zeros[key] = torch.zeros_like(segments[:1])
        return self._zeros[key]


def _scaled(down: Tensor, weights: Tensor) -> Tensor:
    """`down` times each of the weights, contiguous, shape (weights, rank, in)."""
    return torch.mul(down, weights.view(-1, 1, 1), out=down.new_empty(len(weights), *down.shape[-2:]))


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
