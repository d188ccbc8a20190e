"""Tensors of the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.support.fake_cuda.active import current
from tests.support.fake_cuda.streams import FakeStream

# What the C++ half of torch takes the tensors for.
_BACKEND = "fakegpu"
_setup_privateuseone_for_python_backend(_BACKEND)
_GARBAGE = 0x5A


@dataclass(eq=False)
class Memory:
    """What was last written to a tensor's memory, shared by its views: the stream and its count."""

    stream: FakeStream | None = None
    at: int = 0


class FakeTensor(Tensor):
    """A tensor on the device; `data_on_cpu` has its numbers."""

    data_on_cpu: Tensor
    memory: Memory
    owns_memory: bool

    @staticmethod
    def __new__(cls, data: Tensor, memory: Memory | None = None) -> FakeTensor:
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]  torch's stub lacks it
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            layout=data.layout,
            device=torch.device(_BACKEND, 0),
        )
        made.data_on_cpu = data
        made.owns_memory = memory is None
        made.memory = memory or Memory()
        return made

    is_cuda = property(lambda self: True)  # pyright: ignore
    device = property(lambda self: torch.device("cuda:0"))  # pyright: ignore

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]  as torch documents it

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return current().run(func, args, kwargs or {})

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "data":  # a network that gets another dtype keeps its parameters
            self.data_on_cpu, self.memory = value.data_on_cpu, value.memory

    def record_stream(self, s: object) -> None:
        pass

    def pin_memory(self, device: object = None) -> Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.Tensor': only dense CPU tensors can be pinned")

    def __repr__(self, **_: object) -> str:  # pyright: ignore
        return f"FakeTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device=cuda:0)"

    def __deepcopy__(self, memo: Any) -> FakeTensor:
        return FakeTensor(self.data_on_cpu.clone())


def is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", _BACKEND)


def is_pinned(tensor: Tensor) -> bool:
    return getattr(tensor, "fake_pinned", False)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts; torch's own walk over them takes ten times as long."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from tensors_in(value)


def change_tensors(change: Callable[[Tensor], Any], values: Any) -> Any:
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, tuple | list):
        return type(values)(change_tensors(change, value) for value in values)
    if isinstance(values, dict):
        return {name: change_tensors(change, value) for name, value in values.items()}
    return values


def unwrap(values: Any) -> Any:
    return change_tensors(lambda t: t.data_on_cpu if isinstance(t, FakeTensor) else t, values)


def fill_with_garbage(tensor: Tensor) -> None:
    with _disable_current_modes(), torch.no_grad():
        if tensor.numel():
            tensor.fill_(float("nan") if tensor.is_floating_point() else _GARBAGE)
