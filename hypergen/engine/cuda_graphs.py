"""CUDA graphs: many kernels, one launch.

A graph replays the very kernels of the eager run, so its bits are the same, and pins their choice for the
life of the process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from cachetools import LRUCache
from torch import Tensor

from hypergen.engine.request_errors import free_cached_memory

logger = logging.getLogger(__name__)

_MAX_GRAPHS = 32
_MAX_SEEN = 256

Inputs = Mapping[str, Tensor]
Output = TypeVar("Output")


@dataclass(eq=False)
class _Graph(Generic[Output]):
    """A captured run with its static memory."""

    graph: Any
    static: Inputs
    output: Output
    latest: dict[str, Tensor] = field(default_factory=dict[str, Tensor])  # what `static` has the values of

    def replay(self, inputs: Inputs) -> Output:
        for name, tensor in inputs.items():
            if tensor is not self.latest.get(name):
                self.static[name].copy_(tensor)
        self.latest = dict(inputs)
        self.graph.replay()
        return self.output


class CudaGraphs(Generic[Output]):
    """Runs functions of tensors, from the second run of a key and its shapes on as a CUDA graph.

    A function that cannot be captured runs eagerly for good. All graphs share a memory pool, so they must run
    one after another on one stream, and an output is overwritten by the next run. Graphs that run at the same
    time need an instance each: also the workspaces of libraries belong to the stream of a capture.

    Args:
        what: runs, for the log.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        # The second run is captured: what comes once is not worth it.
        self._seen: LRUCache[Hashable, bool] = LRUCache(_MAX_SEEN)
        # None: could not be captured.
        self._graphs: LRUCache[Hashable, _Graph[Output] | None] = LRUCache(_MAX_GRAPHS)

    def run(self, key: Hashable, inputs: Inputs, function: Callable[[Inputs], Output]) -> Output:
        """The function's output.

        Args:
            key: everything but shapes and values of the inputs that the function depends on.
            inputs: of which only the values may differ between runs of a graph; a tensor's values may not
                change in place.
        """
        key = key, tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
        if key not in self._graphs:
            if key not in self._seen:
                self._seen[key] = True
                return function(inputs)
            self._graphs[key] = self._try_to_capture(inputs, function)
        graph = self._graphs[key]
        return function(inputs) if graph is None else graph.replay(inputs)

    def captured(self, name: str) -> list[Tensor]:
        """This input of each graph."""
        return [graph.static[name] for graph in self._graphs.values() if graph is not None]

    def clear(self) -> None:
        """Free the memory of all graphs; they are captured again when they are needed."""
        torch.cuda.synchronize()  # one may be running
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()  # a pool without graphs does not take new ones

    def _try_to_capture(self, inputs: Inputs, function: Callable[[Inputs], Output]) -> _Graph[Output] | None:
        size = "x".join(map(str, inputs["latents"].shape))
        try:
            graph = self._capture(inputs, function)
        except RuntimeError as error:  # no memory, or what a capture does not allow
            reason = str(error).partition("\n")[0]
            logger.warning("%s of latents %s runs without a CUDA graph: %s", self._what, size, reason)
        else:
            logger.info("%s of latents %s runs as a CUDA graph.", self._what, size)
            return graph
        # Outside the handler: inside, the error's frames would keep the memory of the failed capture.
        free_cached_memory()
        return None

    def _capture(self, inputs: Inputs, function: Callable[[Inputs], Output]) -> _Graph[Output]:
        static = {name: tensor.clone() for name, tensor in inputs.items()}
        # Libraries prepare themselves at a stream's first use, which a capture would not allow.
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function(static)
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on to load LoRAs and to pin memory.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = function(static)
        return _Graph(graph, static, output)
