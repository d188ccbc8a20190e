"""Slots: LoRA factors at fixed addresses, which CUDA graphs read.

A slot takes any LoRA of one layout: the same layers with factors of the same shapes. One copy fills it.
An evicted slot never comes back, so a graph that read it does not run again.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from cachetools import LRUCache
from torch import Tensor
from torch.nn import functional

from hypergen.lora.weights import LayerWeights, Lora, LoraFile, in_text_encoder

# Bytes: as if each factor had been allocated alone, because kernels are also chosen by alignment.
_ALIGNMENT = 512
# Of products, in segments.
_SIZES = (1, 4, 16)

_Weights = TypeVar("_Weights")


def product_size(segments: int) -> int:
    """The size of a product for LoRAs with so many segments together.

    There are few sizes, because each size of a batch takes launches. The largest products, of full matrices
    and many LoRAs, are not padded.
    """
    return next((size for size in _SIZES if size >= segments), segments)


def joined(weights: LayerWeights, segment_rank: int) -> LayerWeights:
    """The factors of a product in one tensor, in segments, so that one kernel gathers those of all rows.

    They are padded with zeros to the size of the product of a row that has this LoRA alone.
    """
    if not weights.is_plain:
        return weights
    segments = math.ceil(weights.rank / segment_rank)
    size = product_size(segments)
    joint = torch.cat([weights.down.flatten(1), weights.up.T], dim=1)
    joint = functional.pad(joint, (0, 0, 0, size * segment_rank - weights.rank))
    inputs = tuple(weights.down.shape[1:])
    return LayerWeights.of_joint(joint.unflatten(0, (size, segment_rank)), inputs, segments)


def pack(content: LoraFile, name: str) -> Lora:
    """A LoRA whose factors of the denoiser lie in one block of memory, if it has nothing but products."""
    own = _of_denoiser(content.layers)
    if not own or content.norms or not all(weights.is_plain for weights in content.layers.values()):
        return Lora(content, name)
    size = sum(_padded(tensor) for weights in own.values() for tensor in _tensors(weights))
    memory = torch.empty(size, dtype=torch.uint8, device=next(iter(own.values())).down.device)
    packed = _views(own, memory)
    for layer, weights in packed.items():
        for target, source in zip(_tensors(weights), _tensors(own[layer]), strict=True):
            target.copy_(source)
    shapes = [(layer, w.down.shape, w.up.shape, w.segment_count, w.down.dtype) for layer, w in own.items()]
    layout = hashlib.sha256(repr(shapes).encode()).digest()
    return Lora(replace(content, layers={**content.layers, **packed}), name, memory, layout)


def _of_denoiser(layers: Mapping[str, _Weights]) -> dict[str, _Weights]:
    return {layer: layers[layer] for layer in sorted(layers) if not in_text_encoder(layer)}


def _tensors(weights: LayerWeights) -> tuple[Tensor, ...]:
    return (weights.down, weights.up) if weights.joint is None else (weights.joint,)


def _padded(tensor: Tensor) -> int:
    return math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT


def _views(layers: dict[str, LayerWeights], memory: Tensor) -> dict[str, LayerWeights]:
    """Factors in the shapes of `layers`, one after another in a block of memory."""
    end = 0

    def view(like: Tensor) -> Tensor:
        nonlocal end
        start, end = end, end + _padded(like)
        return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)

    def views(like: LayerWeights) -> LayerWeights:
        if like.joint is None:
            return LayerWeights(view(like.down), view(like.up))
        return LayerWeights.of_joint(view(like.joint), tuple(like.down.shape[1:]), like.segment_count)

    return {layer: views(weights) for layer, weights in layers.items()}


@dataclass
class _Slot:
    lora: Lora
    memory: Tensor
    holds: int | None = None  # number of the LoRA whose factors it has


class LoraSlots:
    """The least recently used slots are evicted. Belongs to the engine's thread.

    Args:
        max_bytes: of all slots.
    """

    def __init__(self, max_bytes: float) -> None:
        self._slots: LRUCache[tuple[bytes, int], _Slot] = LRUCache(max_bytes, lambda slot: slot.memory.nbytes)

    def clear(self) -> None:
        """Free all slots; no graph may read them any more."""
        self._slots.clear()

    def fill(self, loras: Sequence[Lora]) -> list[Lora] | None:
        """Slots with the factors of these LoRAs, as LoRAs; None: one cannot be in a slot, or no room for all.

        Valid until the next call. The `number` of a slot is its identity.
        """
        packed = [(lora, lora.memory) for lora in loras if lora.memory is not None]
        if len(packed) < len(loras) or sum(m.nbytes for _, m in packed) > self._slots.maxsize:
            return None
        used: Counter[bytes] = Counter()
        slots: list[Lora] = []
        for lora, memory in packed:
            key = lora.layout, used[lora.layout]
            used[lora.layout] += 1
            slot = self._slots.get(key)
            if slot is None:
                slot = self._slots[key] = _make_slot(lora, memory)
            if slot.holds != lora.number:
                slot.memory.copy_(memory)
                slot.holds = lora.number
            slots.append(slot.lora)
        return slots


def _make_slot(lora: Lora, like: Tensor) -> _Slot:
    memory = torch.empty_like(like)
    return _Slot(Lora(LoraFile(_views(_of_denoiser(lora.layers), memory))), memory)
