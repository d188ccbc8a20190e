"""The weights of networks in main memory, from which they are copied to a device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# torch rounds each pinned allocation up to a power of two, so tensors share some of this size.
_CHUNK_BYTES = 1 << 29
# That of CUDA's allocations: kernels are chosen by alignment.
_ALIGNMENT = 512

# A module's `_parameters` or `_buffers`, and the name of a tensor in it.
_Place = tuple[dict[str, Tensor | None], str]


@dataclass(eq=False)
class _Weight:
    """A tensor of one or, if networks share it, several modules."""

    tensor: Tensor
    places: list[_Place]

    @property
    def packed_bytes(self) -> int:
        return -(-self.tensor.nbytes // _ALIGNMENT) * _ALIGNMENT

    def put(self, tensor: Tensor) -> None:
        if isinstance(self.tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, self.tensor.requires_grad)
        self.tensor = tensor
        for tensors, name in self.places:
            tensors[name] = tensor


@dataclass(eq=False)
class _Chunk:
    """Weights that share one allocation, in main memory and on the device."""

    weights: list[_Weight] = field(default_factory=list[_Weight])
    nbytes: int = 0

    def to_host(self, pin: bool) -> None:
        self.host = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=pin)
        views = self._views(self.host)
        for weight, view in zip(self.weights, views, strict=True):
            weight.put(view.copy_(weight.tensor, non_blocking=pin))

    def put(self, memory: Tensor) -> None:
        for weight, view in zip(self.weights, self._views(memory), strict=True):
            weight.put(view)

    def _views(self, memory: Tensor) -> list[Tensor]:
        parts = memory.split([weight.packed_bytes for weight in self.weights])
        return [_view_like(weight.tensor, part) for weight, part in zip(self.weights, parts, strict=True)]


class HostWeights:
    """Moves the weights of networks to main memory, then to the device and back as often as needed.

    The weights of a served model never change, so only the first move copies from the device: later ones drop
    the device's copy. Main memory is pinned for CUDA, and copies from it are queued on the current stream.

    Args:
        device: where the networks run.

    Raises:
        RuntimeError: there is no memory. The networks are unusable then.
    """

    def __init__(self, networks: Iterable[nn.Module], device: torch.device) -> None:
        self._device = device
        weights = _weights_of(networks)
        # Quantized weights of torchao are several tensors, which it does not pin: they move one by one.
        packable = [weight for weight in weights if not is_traceable_wrapper_subclass(weight.tensor)]
        self._others = [weight for weight in weights if is_traceable_wrapper_subclass(weight.tensor)]
        self._chunks = _pack(packable)
        with torch.inference_mode(False), torch.no_grad():
            for chunk in self._chunks:
                chunk.to_host(pin=device.type == "cuda")
            for weight in self._others:
                weight.put(weight.tensor.to("cpu"))
        self._others_on_host = [weight.tensor for weight in self._others]
        if device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    @property
    def nbytes(self) -> int:
        """Bytes of main memory."""
        others = sum(tensor.nbytes for tensor in self._others_on_host)
        return others + sum(chunk.nbytes for chunk in self._chunks)

    def load(self) -> None:
        """Copy the weights to the device.

        Raises:
            RuntimeError: the device has no memory. The networks stay in main memory.
        """
        # Quantized weights cannot be moved in inference mode, in which the engine runs.
        with torch.inference_mode(False), torch.no_grad():
            chunks = [chunk.host.to(self._device, non_blocking=True) for chunk in self._chunks]
            others = [tensor.to(self._device) for tensor in self._others_on_host]
            self._put(chunks, others)

    def unload(self) -> None:
        """Drop the device's copy."""
        with torch.inference_mode(False), torch.no_grad():
            self._put([chunk.host for chunk in self._chunks], self._others_on_host)

    def _put(self, chunks: list[Tensor], others: list[Tensor]) -> None:
        for chunk, memory in zip(self._chunks, chunks, strict=True):
            chunk.put(memory)
        for weight, tensor in zip(self._others, others, strict=True):
            weight.put(tensor)


def _weights_of(networks: Iterable[nn.Module]) -> list[_Weight]:
    """The parameters and buffers of networks, each once."""
    weights: dict[int, _Weight] = {}
    modules = {module: None for network in networks for module in network.modules()}
    for module in modules:
        tensors: dict[str, Tensor | None]
        for tensors in (module._parameters, module._buffers):  # pyright: ignore[reportAssignmentType]  narrower
            for name, tensor in tensors.items():
                if tensor is not None:
                    weights.setdefault(id(tensor), _Weight(tensor, [])).places.append((tensors, name))
    return list(weights.values())


def _pack(weights: Iterable[_Weight]) -> list[_Chunk]:
    chunks: list[_Chunk] = []
    for weight in weights:
        if not chunks or chunks[-1].nbytes + weight.packed_bytes > _CHUNK_BYTES:
            chunks.append(_Chunk())
        chunks[-1].weights.append(weight)
        chunks[-1].nbytes += weight.packed_bytes
    return chunks


def _view_like(tensor: Tensor, memory: Tensor) -> Tensor:
    """A view of bytes with the shape, dtype and memory format of a tensor."""
    view = memory[: tensor.nbytes].view(tensor.dtype)
    is_channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    if is_channels_last or tensor.is_contiguous():
        return view.as_strided(tensor.shape, tensor.stride())
    return view.view(tensor.shape)  # such as an expanded buffer
