"""The device: runs operations on the CPU, counts them, and fails where CUDA would."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from weakref import WeakSet, finalize

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import _disable_current_modes

from tests.support.fake_cuda.active import place
from tests.support.fake_cuda.graphs import FakeGraph
from tests.support.fake_cuda.streams import FakeStream, current_stream
from tests.support.fake_cuda.tensors import (
    FakeTensor,
    Memory,
    change_tensors,
    fill_with_garbage,
    is_cuda,
    is_pinned,
    pin,
    tensors_in,
    unwrap,
)

aten = torch.ops.aten

# What CUDA does without a kernel: views and memory.
_NO_LAUNCH = {
    "detach",
    "alias",
    "_unsafe_view",
    "_reshape_alias",
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "is_pinned",
    "set_",
}
# Results that only the host can know.
_WAITING = {"nonzero", "equal", "masked_select", "unique_dim", "_unique2", "is_nonzero", "bincount"}
# Computed in float32: a GPU accumulates in it, and float16 is slow on a CPU.
_PRODUCTS = {"convolution", "mm", "addmm", "bmm", "baddbmm"}
_TAKE_CPU_TENSORS = {"index", "index_put", "index_put_", "copy_", "_to_copy"}


@dataclass(eq=False)
class _Copy:
    """An asynchronous copy between host and device that the host does not know to be done."""

    stream: FakeStream
    at: int
    done: Callable[[], None]


class FakeCuda:
    """The device, and what happened on it.

    Attributes:
        launches, copies, waits: counted by kind and line, for example "equal @ hypergen/engine/engine.py:12".
            Waits after which the device has nothing to do.
        copied_bytes: of the copies, by the same keys.
        cpu_operations: on CPU tensors, which cost the host time.
        fails, pinning_fails: asked before each allocation of so many bytes, on the device and of pinned
            memory; True raises an out-of-memory error.
        out_of_memory: what it raises.
        total_memory: of the device, in bytes.
        allocated, peak: bytes of tensors now, and at most since the peak was reset.
    """

    def __init__(self, total_memory: int = 24 * 10**9) -> None:
        self.total_memory = total_memory
        self.memory_limit: float = total_memory
        self.allocated = self.peak = 0
        self.launches: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.copied_bytes: Counter[str] = Counter()
        self.cpu_operations = 0
        self.launched = 0
        self.replayed = 0  # graphs
        self.fails: Callable[[int], bool] = lambda _bytes: False
        self.pinning_fails: Callable[[int], bool] = lambda _bytes: False
        self.out_of_memory: Callable[[], Exception] = lambda: torch.OutOfMemoryError(
            "CUDA out of memory. (fake)"
        )
        self.known: Counter[FakeStream] = Counter()  # how far the host has seen each stream
        self.capturing: FakeGraph | None = None
        self.graph_memory: dict[object, Memory] = {}  # by memory pool, and by stream of a capture
        self.graphs: WeakSet[FakeGraph] = WeakSet()  # captured and not deleted
        self.default_stream = FakeStream()
        self.streams: set[FakeStream] = set()
        self._copies: list[_Copy] = []
        self._pinned: list[weakref.ref[UntypedStorage]] = []
        self._lock = threading.RLock()

    def reset(self) -> None:
        """Count anew."""
        for counter in (self.launches, self.copies, self.waits, self.copied_bytes):
            counter.clear()
        self.cpu_operations = 0

    @property
    def pinned_bytes(self) -> int:
        """Of the pinned memory in use that `torch.empty` allocated."""
        return sum(memory.nbytes() for reference in self._pinned if (memory := reference()) is not None)

    def count(self, what: str, kind: str) -> None:
        if what == "launches":
            self.launched += 1
        getattr(self, what)[f"{kind} @ {place()}"] += 1

    def count_copy(self, kind: str, copied: Tensor) -> None:
        self.count("copies", kind)
        self.copied_bytes[f"{kind} @ {place()}"] += copied.nbytes

    def wait(self, kind: str, until: dict[FakeStream, int] | Counter[FakeStream]) -> None:
        """Let the host wait until these streams have come so far."""
        with self._lock:
            if self.capturing is not None and self.capturing.forbids_waits():
                raise RuntimeError(f"operation not permitted when stream is capturing: wait for {kind}")
            waited = any(self.known[stream] < at for stream, at in until.items())
            self.known |= Counter(until)
            # With work left for the device, the host only stays near it.
            if waited and all(self.known[stream] >= stream.count for stream in self.streams):
                self.count("waits", kind)
            passed = [copy for copy in self._copies if self.known[copy.stream] >= copy.at]
            self._copies = [copy for copy in self._copies if self.known[copy.stream] < copy.at]
            for copy in passed:
                copy.done()

    def wait_for(self, kind: str, tensor: FakeTensor) -> None:
        """Let the host wait until the current stream has done all, the tensor's last write among it."""
        stream = current_stream()
        self.check_order(tensor.memory, stream, kind)
        stream.count += 1
        self.wait(kind, Counter({**stream.seen, stream: stream.count}))

    def synchronize(self, _device: object = None) -> None:
        self.wait("device", Counter({stream: stream.count for stream in self.streams}))

    def check_order(self, memory: Memory, stream: FakeStream, what: object) -> None:
        """Raise where a stream uses what another one may still be writing."""
        writer, at = memory.stream, memory.at
        if writer is None or writer is stream or stream.seen[writer] >= at or self.known[writer] >= at:
            return
        raise RuntimeError(f"Race: {what} uses a tensor that another stream may still be writing; {place()}")

    def written(self, memory: Memory, stream: FakeStream) -> None:
        if self.capturing is None or self.capturing.stream is not stream:  # a capture runs nothing
            stream.count += 1
        self.streams.add(stream)
        memory.stream, memory.at = stream, stream.count

    def record(self, function: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Let a graph that is captured on the current stream have this operation."""
        if self.capturing is not None and self.capturing.stream is current_stream():
            self.capturing.calls.append((function, args, kwargs, output))

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        with self._lock:
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.partition("::")[2]
        tensors = list(tensors_in((args, kwargs)))
        ours = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if func is aten._local_scalar_dense.default and ours:
            self.wait_for("item", ours[0])
            return func(ours[0].data_on_cpu)
        if func is aten._to_copy.default:
            return self._to_copy(args[0], dict(kwargs))
        if func is aten._pin_memory.default:
            pinned = args[0].clone()
            pin(pinned)
            return pinned
        if func is aten.copy_.default and isinstance(args[0], FakeTensor) != isinstance(args[1], FakeTensor):
            return self._copy_across(*args, **kwargs)
        foreign = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor) and tensor.dim() > 0]
        if ours and foreign and name not in _TAKE_CPU_TENSORS:
            shapes = [tuple(tensor.shape) for tensor in foreign]
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {func} got CPU tensors of {shapes} too; "
                f"{place()}"
            )
        if ours and foreign and name == "index" and not isinstance(args[0], FakeTensor):
            raise RuntimeError(f"indices should be on the device of the indexed tensor; {place()}")
        if ours and foreign and name.startswith("index"):
            self.count("copies", "host to device, of an index")
            self.wait_for("index", ours[0])
        on_device = bool(ours) or is_cuda(kwargs.get("device"))
        plain = unwrap(kwargs)
        if is_cuda(plain.get("device")):
            plain["device"] = torch.device("cpu")
        pinned = plain.pop("pin_memory", False)
        if not on_device:
            self.cpu_operations += name not in _NO_LAUNCH and not func.is_view
            return self._make_pinned(func, args, plain) if pinned else func(*args, **plain)
        stream = current_stream()
        for tensor in ours:
            self.check_order(tensor.memory, stream, func)
        if name in _WAITING:
            self.wait_for(name, ours[0])
        in_float32 = name in _PRODUCTS and {tensor.dtype for tensor in ours} == {torch.float16}
        compute = partial(_in_float32, func) if in_float32 else func
        output = compute(*unwrap(args), **plain)
        if not (func.is_view or name in _NO_LAUNCH):
            self.count("launches", name)
        wrapped = change_tensors(lambda value: self._wrap(value, ours, stream, func), output)
        self.record(compute, args, plain, wrapped)
        return wrapped

    def _make_pinned(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        made = func(*args, **kwargs)
        if self.pinning_fails(made.nbytes):
            raise torch.AcceleratorError("CUDA error: out of memory (fake)")
        self._pinned.append(weakref.ref(pin(made)))
        return made

    def _wrap(self, value: Any, inputs: Sequence[FakeTensor], stream: FakeStream, func: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        storage = value.untyped_storage().data_ptr()
        for tensor in inputs:
            if tensor.data_on_cpu is value:
                self.written(tensor.memory, stream)
                return tensor
        base = next((t for t in inputs if t.data_on_cpu.untyped_storage().data_ptr() == storage != 0), None)
        if base is not None:
            view = FakeTensor(value, base.memory)
            if not (func.is_view or func._schema.name.partition("::")[2] in _NO_LAUNCH):
                self.written(view.memory, stream)
            return view
        made = self.allocate(value)
        self.written(made.memory, stream)
        return made

    def allocate(self, data: Tensor) -> FakeTensor:
        """A tensor with memory of its own."""
        size = data.untyped_storage().nbytes()
        if self.allocated + size > self.memory_limit:
            gc.collect()
        if self.fails(size) or self.allocated + size > self.memory_limit:
            raise self.out_of_memory()
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        made = FakeTensor(data)
        finalize(made.memory, self._free, size)
        return made

    def _free(self, size: int) -> None:
        with self._lock:
            self.allocated -= size

    def _to_copy(self, source: Tensor, kwargs: dict[str, Any]) -> Tensor:
        target = kwargs.pop("device", None)
        non_blocking: bool = kwargs.pop("non_blocking", False)
        kwargs.pop("pin_memory", None)
        stream = current_stream()
        if not isinstance(source, FakeTensor):
            if not is_cuda(target):
                self.cpu_operations += 1
                return aten._to_copy.default(source, device=target or source.device, **kwargs)
            data = aten._to_copy.default(source, **kwargs)
            made = self.allocate(data.clone() if data is source else data)
            self._host_to_device(source, made, non_blocking)
            return made
        self.check_order(source.memory, stream, "copy")
        if target is None or is_cuda(target):
            data = aten._to_copy.default(source.data_on_cpu, **kwargs)
            made = self.allocate(data)
            self.count("launches", "copy")
            self.written(made.memory, stream)
            self.record(aten._to_copy.default, (source,), kwargs, made)
            return made
        data = aten._to_copy.default(source.data_on_cpu, **kwargs)
        return self._device_to_host(source, data, torch.empty_like(data), non_blocking)

    def _copy_across(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if isinstance(target, FakeTensor):
            target.data_on_cpu.copy_(source)
            self._host_to_device(source, target, non_blocking)
            return target
        ours = cast(FakeTensor, source)
        self.check_order(ours.memory, current_stream(), "copy")
        data = ours.data_on_cpu.to(target.dtype).expand_as(target).clone()
        return self._device_to_host(ours, data, target, non_blocking and is_pinned(target))

    def _host_to_device(self, source: Tensor, made: FakeTensor, non_blocking: bool) -> None:
        self.count_copy("host to device", source)
        stream = current_stream()
        self.written(made.memory, stream)
        if non_blocking and is_pinned(source):
            version = source._version

            def unchanged() -> None:
                if source._version != version:
                    raise RuntimeError("Pinned memory was changed before its copy to the device was done.")

            self._copies.append(_Copy(stream, stream.count, unchanged))
            self.record(_upload, (made, source), {}, made)
            return
        # From pageable memory the stream is waited for, whatever `non_blocking` says.
        self.wait("copy to the device", Counter({**stream.seen, stream: stream.count}))

    def _device_to_host(self, source: FakeTensor, data: Tensor, target: Tensor, non_blocking: bool) -> Tensor:
        self.count_copy("device to host", data)
        stream = current_stream()
        stream.count += 1
        if not non_blocking:
            self.wait("copy to the host", Counter({**stream.seen, stream: stream.count}))
            target.copy_(data)
            return target
        fill_with_garbage(target)
        with _disable_current_modes():
            copied = target.copy_  # not counted as work of the host

        def arrive() -> None:
            with _disable_current_modes(), torch.no_grad():
                copied(data)

        self._copies.append(_Copy(stream, stream.count, arrive))
        return target


def _in_float32(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    as_float32 = change_tensors(lambda tensor: tensor.float(), args)
    return func(*as_float32, **kwargs).half()


def _upload(target: Tensor, source: Tensor) -> Tensor:
    return target.copy_(source)
