"""Graphs: operations that were captured, to be run again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from tests.support.fake_cuda.active import current
from tests.support.fake_cuda.streams import FakeStream, current_stream
from tests.support.fake_cuda.tensors import FakeTensor, Memory, fill_with_garbage, tensors_in, unwrap


@dataclass(eq=False)
class FakeGraph:
    """A captured graph: the operations, with the tensors they were captured on.

    Attributes:
        shared: what it shares with other graphs, which must not run at the same time: the memory of its pool,
            and the workspaces of libraries, which belong to the stream of the capture.
    """

    calls: list[tuple[Any, Any, Any, Any]] = field(default_factory=list[tuple[Any, Any, Any, Any]])
    replays: int = 0
    shared: tuple[Memory, ...] = ()
    stream: FakeStream | None = None  # of the capture
    capture_error_mode: str = "global"

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        device = current()
        if device.capturing is not None:
            raise RuntimeError("A graph is captured already.")
        device.capturing = self
        device.graphs.add(self)
        self.stream, self.capture_error_mode = current_stream(), capture_error_mode
        owners = (self if pool is None else pool, current_stream())
        self.shared = tuple(device.graph_memory.setdefault(owner, Memory()) for owner in owners)

    def forbids_waits(self) -> bool:
        """Whether the calling thread may not wait during the capture."""
        return self.capture_error_mode == "global" or self.stream is current_stream()

    def capture_end(self) -> None:
        device = current()
        device.capturing = None
        for _, _, _, output in self.calls:
            for tensor in tensors_in(output):
                if isinstance(tensor, FakeTensor):
                    tensor.memory.stream = None  # nothing ran yet
                    if tensor.owns_memory:
                        fill_with_garbage(tensor.data_on_cpu)

    def replay(self) -> None:
        device = current()
        self.replays += 1
        device.replayed += 1
        device.count("launches", "graph")
        stream = current_stream()
        for memory in self.shared:
            device.check_order(memory, stream, "graph")
        with _disable_current_modes(), torch.no_grad():
            for function, args, kwargs, output in self.calls:
                inputs = [*tensors_in(args), *tensors_in(kwargs)]
                for tensor in inputs:
                    if isinstance(tensor, FakeTensor):
                        device.check_order(tensor.memory, stream, function)
                new = function(*unwrap(args), **unwrap(kwargs))
                for old, value in zip(tensors_in(output), tensors_in(new), strict=True):
                    if isinstance(old, FakeTensor):
                        if old.data_on_cpu is not value and old.owns_memory:
                            old.data_on_cpu.copy_(value)
                        # A new view writes nothing, also of weights that other streams read.
                        if old.owns_memory or any(old is tensor for tensor in inputs):
                            device.written(old.memory, stream)
        for memory in self.shared:
            device.written(memory, stream)

    def reset(self) -> None:
        self.calls.clear()

    def pool(self) -> object:
        return self
