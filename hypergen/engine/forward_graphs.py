"""CUDA graphs of the denoiser's forward pass: many kernels, one launch.

A graph is of one shape and row count. It replays the very kernels of the eager forward pass, so its bits are
the same, and pins their choice for the life of the process.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor

from hypergen.denoising.denoising_state import ModelInputs
from hypergen.models.family import Family

logger = logging.getLogger(__name__)

# The second forward pass of a shape is captured: a shape that comes once is not worth it.
_CAPTURE_AT_USE = 2
_MAX_GRAPHS = 32


@dataclass(eq=False)
class _Graph:
    """A captured forward pass with its static memory."""

    graph: Any
    latents: Tensor
    timesteps: Tensor
    inputs: ModelInputs
    output: Tensor
    latest: ModelInputs | None = None  # what `inputs` has the values of

    def replay(self, latents: Tensor, timesteps: Tensor, inputs: ModelInputs) -> Tensor:
        self.latents.copy_(latents)
        self.timesteps.copy_(timesteps)
        if inputs is not self.latest:
            for name, tensor in vars(inputs).items():
                if tensor is not None:
                    getattr(self.inputs, name).copy_(tensor)
            self.latest = inputs
        self.graph.replay()
        return self.output


class ForwardGraphs:
    """Runs forward passes, from the second of a shape on as a CUDA graph.

    The output is overwritten by the next forward pass of its shape. Belongs to the engine's thread.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        self._uses: Counter[Hashable] = Counter()
        # None: could not be captured, and runs eagerly for good.
        self._graphs: LRUCache[Hashable, _Graph | None] = LRUCache(_MAX_GRAPHS)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        inputs: ModelInputs,
        batch_key_extra: tuple[Hashable, ...] = (),
    ) -> Tensor:
        """See `Family.forward`."""
        tensors = {"latents": latents, **vars(inputs)}
        shapes = tuple((name, t.shape, t.dtype) for name, t in tensors.items() if t is not None)
        key = (type(inputs), shapes, batch_key_extra)
        if key not in self._graphs:
            self._uses[key] += 1
            if self._uses[key] < _CAPTURE_AT_USE:
                return self._family.forward(latents, timesteps, inputs, batch_key_extra=batch_key_extra)
            del self._uses[key]
            self._graphs[key] = self._try_to_capture(latents, timesteps, inputs, batch_key_extra)
        graph = self._graphs[key]
        if graph is None:
            return self._family.forward(latents, timesteps, inputs, batch_key_extra=batch_key_extra)
        return graph.replay(latents, timesteps, inputs)

    def _try_to_capture(
        self,
        latents: Tensor,
        timesteps: Tensor,
        inputs: ModelInputs,
        batch_key_extra: tuple[Hashable, ...],
    ) -> _Graph | None:
        size = "x".join(map(str, latents.shape))
        try:
            graph = self._capture(latents, timesteps, inputs, batch_key_extra)
        except RuntimeError as error:  # no memory, or what a capture does not allow
            logger.warning("Latents %s run without a CUDA graph: %s", size, str(error).partition("\n")[0])
        else:
            logger.info("Captured a CUDA graph for latents %s.", size)
            return graph
        return None

    def _capture(
        self,
        latents: Tensor,
        timesteps: Tensor,
        inputs: ModelInputs,
        batch_key_extra: tuple[Hashable, ...],
    ) -> _Graph:
        static = latents.clone(), timesteps.clone(), inputs.map(torch.clone)
        # Libraries prepare themselves at a stream's first use, which a capture would not allow.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._family.forward(*static, batch_key_extra=batch_key_extra)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on to load LoRAs and to pin memory.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = self._family.forward(*static, batch_key_extra=batch_key_extra)
        return _Graph(graph, *static, output)
