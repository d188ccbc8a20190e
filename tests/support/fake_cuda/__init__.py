"""A CUDA device without a GPU: tensors that say cuda:0 and compute on the CPU.

`with fake_cuda() as device:` replaces what the engine uses of `torch.cuda` and makes the mistakes fail that a
GPU forgives at times and punishes at others:

- an operation on tensors of two devices raises;
- an asynchronous copy to the host holds garbage until its event or stream is waited for;
- an operation on another stream than the one that wrote its input raises, unless it waited for that stream;
- pinned memory that is changed before its copy to the device is done raises at the next wait;
- while a graph is captured nothing may wait, but other threads if the capture is "thread_local", and what was
  captured holds garbage until the first replay;
- graphs of one memory pool, or captured on one stream, that may run at the same time raise.

Launches, copies and waits of the host are counted, with the line of code that caused each.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from diffusers.pipelines import pipeline_utils
from torch import Tensor
from torch.autograd import grad_mode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.support.fake_cuda.active import current, enter, leave
from tests.support.fake_cuda.device import FakeCuda
from tests.support.fake_cuda.graphs import FakeGraph
from tests.support.fake_cuda.streams import FakeEvent, FakeStream, current_stream, use_default_stream
from tests.support.fake_cuda.tensors import FakeTensor, is_cuda, is_device, unwrap

__all__ = ["FakeCuda", "fake_cuda"]


class _Mode(TorchDispatchMode):
    """Sees the operations of a thread that have no tensor of the device among their arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return current().run(func, args, kwargs or {})


@contextmanager
def _stream_context(stream: FakeStream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    with stream:
        yield


@contextmanager
def _graph_context(
    graph: FakeGraph,
    pool: object = None,
    stream: FakeStream | None = None,
    capture_error_mode: str = "global",
) -> Iterator[None]:
    current().synchronize()
    with stream or FakeStream():
        graph.capture_begin(pool, capture_error_mode)
        try:
            yield
        finally:
            graph.capture_end()


def _tensor(data: Any, *, dtype: Any = None, device: Any = None, **others: Any) -> Tensor:
    device = torch.empty(0).device if device is None else torch.device(device)
    if not is_cuda(device):
        return _real_tensor(data, dtype=dtype, device=device, **others)
    return _real_tensor(data, dtype=dtype, device="cpu", **others).to(device)


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """With the index of the device, which torch would ask its CUDA half for."""
    if args and is_device(args[0]) and is_cuda(args[0]):
        args = (torch.device("cuda:0"), *args[1:])
    return _real_to(tensor, *args, **kwargs)


_real_to = Tensor.to
_real_tensor = torch.tensor
_real_attention = functional.scaled_dot_product_attention


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """One launch, as CUDA's fused kernels."""
    tensors = [t for t in (query, key, value, *args, *kwargs.values()) if isinstance(t, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
    if not ours:
        return _real_attention(query, key, value, *args, **kwargs)
    device, stream = current(), current_stream()
    if len(ours) != len(tensors):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but attention got CPU tensors too."
        )
    for tensor in ours:
        device.check_order(tensor.memory, stream, "attention")

    def run(*inner: Any, **named: Any) -> Tensor:
        with _disable_current_modes():
            return _real_attention(*inner, **named)

    device.count("launches", "attention")
    arguments = (query, key, value, *args)
    data = run(*unwrap(arguments), **unwrap(kwargs))
    made = device.allocate(data)
    device.written(made.memory, stream)
    device.record(run, arguments, kwargs, made)
    return made


@contextmanager
def fake_cuda(total_memory: int = 24 * 10**9) -> Iterator[FakeCuda]:
    """Pretend that there is a CUDA device, in all threads that start meanwhile."""
    device = FakeCuda(total_memory)
    properties = SimpleNamespace(
        name="Fake GPU", total_memory=total_memory, major=9, minor=0, multi_processor_count=132
    )
    run_thread = threading.Thread.run

    def run_with_mode(thread: threading.Thread) -> None:
        with _Mode():
            run_thread(thread)

    def in_thread(mode: Any) -> None:
        mode._no_grad = grad_mode.no_grad()
        mode._no_grad.__enter__()

    replacements: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "_lazy_init": lambda: None,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "current_stream": current_stream,
            "default_stream": lambda *_: device.default_stream,
            "Stream": FakeStream,
            "Event": FakeEvent,
            "stream": _stream_context,
            "synchronize": device.synchronize,
            "empty_cache": lambda: None,
            "mem_get_info": lambda *_: (total_memory - device.allocated, total_memory),
            "memory_allocated": lambda *_: device.allocated,
            "memory_reserved": lambda *_: device.allocated,
            "max_memory_allocated": lambda *_: device.peak,
            "reset_peak_memory_stats": lambda *_: setattr(device, "peak", device.allocated),
            "set_per_process_memory_fraction": lambda fraction, *_: setattr(
                device, "memory_limit", fraction * total_memory
            ),
            "get_device_properties": lambda *_: properties,
            "get_device_name": lambda *_: properties.name,
            "get_device_capability": lambda *_: (9, 0),
            "is_bf16_supported": lambda including_emulation=True: True,
            "is_current_stream_capturing": lambda: device.capturing is not None,
            "CUDAGraph": FakeGraph,
            "graph": _graph_context,
            "graph_pool_handle": object,
        },
        torch: {"tensor": _tensor},
        torch.accelerator: {"empty_host_cache": lambda: None},
        Tensor: {"to": _to},
        # diffusers looks for devices when it is imported.
        pipeline_utils: {"SUPPORTED_DEVICE_MAP": ["balanced", "cuda", "cpu"]},
        functional: {"scaled_dot_product_attention": _attention},
        threading.Thread: {"run": run_with_mode},
        grad_mode.inference_mode: {
            "__enter__": in_thread,
            "__exit__": lambda mode, *exception: mode._no_grad.__exit__(*exception),
        },
    }
    with _all(
        patch.object(owner, name, new) for owner, names in replacements.items() for name, new in names.items()
    ):
        enter(device)
        use_default_stream()
        try:
            with _Mode():
                yield device
        finally:
            leave()
            use_default_stream()


@contextmanager
def _all(contexts: Iterator[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
