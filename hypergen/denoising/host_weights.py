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
    def is_quantized(self) -> bool:
        """Quantized weights of torchao are several tensors, which it does not pin: they move one by one."""
        return is_traceable_wrapper_subclass(self.tensor)

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

    @property
    def host_bytes(self) -> int:
        return 1 << max(0, self.nbytes - 1).bit_length()

    def to_host(self, pin: bool) -> None:
        self.host = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=pin)
        for weight, view in zip(self.weights, self._views(self.host), strict=True):
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
    the device's copy. Copies from pinned memory are queued on the current stream, without a wait.

    Args:
        device: where the networks run.
        pin: pin the memory, for CUDA.

    Attributes:
        nbytes: of main memory.

    Raises:
        RuntimeError: there is no memory. Some networks may be in main memory then, and some on the device.
    """

    def __init__(self, networks: Iterable[nn.Module], device: torch.device, *, pin: bool) -> None:
        self._device = device
        weights = _weights_of(networks)
        self.nbytes = _host_bytes(weights)
        self._chunks = _pack(weight for weight in weights if not weight.is_quantized)
        self._quantized = [weight for weight in weights if weight.is_quantized]
        with torch.inference_mode(False), torch.no_grad():
            for chunk in self._chunks:
                chunk.to_host(pin)
            for weight in self._quantized:
                weight.put(weight.tensor.to("cpu"))
        self._quantized_on_host = [weight.tensor for weight in self._quantized]
        if pin:
            torch.cuda.current_stream().synchronize()

    def load(self) -> None:
        """Copy the weights to the device.

        Raises:
            RuntimeError: the device has no memory. The networks stay in main memory.
        """
        # Quantized weights cannot be moved in inference mode, in which the engine runs.
        with torch.inference_mode(False), torch.no_grad():
            chunks = [chunk.host.to(self._device, non_blocking=True) for chunk in self._chunks]
            quantized = [tensor.to(self._device) for tensor in self._quantized_on_host]
            self._put(chunks, quantized)

    def unload(self) -> None:
        """Drop the device's copy."""
        with torch.inference_mode(False), torch.no_grad():
            self._put([chunk.host for chunk in self._chunks], self._quantized_on_host)

    def _put(self, chunks: list[Tensor], quantized: list[Tensor]) -> None:
        for chunk, memory in zip(self._chunks, chunks, strict=True):
            chunk.put(memory)
        for weight, tensor in zip(self._quantized, quantized, strict=True):
            weight.put(tensor)


def host_bytes(networks: Iterable[nn.Module]) -> int:
    """Main memory that the `HostWeights` of these networks take."""
    return _host_bytes(_weights_of(networks))


def _host_bytes(weights: list[_Weight]) -> int:
    chunks = _pack(weight for weight in weights if not weight.is_quantized)
    quantized = sum(weight.tensor.nbytes for weight in weights if weight.is_quantized)
    return quantized + sum(chunk.host_bytes for chunk in chunks)


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
