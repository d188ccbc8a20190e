"""One model of an engine process: on its device, evicted to main memory, or only in its files."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from hypergen.denoising.host_weights import HostWeights
from hypergen.events import EngineStatus
from hypergen.model_info import ModelInfo
from hypergen.request import GenerationRequest
from hypergen.served_model import ServedModel


class ModelEngine(Protocol):
    """The engine of one model: an `Engine` or a `PipelineEngine`."""

    last_step_at: float

    @property
    def has_requests(self) -> bool: ...
    def add_request(self, request: GenerationRequest) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def step(self) -> float: ...
    def status(self) -> EngineStatus: ...
    def free_memory(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        size_bytes: size of its weights.
        movable: all of its networks, if its weights can be moved to main memory and back.
    """

    engine: ModelEngine
    model_info: ModelInfo
    size_bytes: int
    movable: tuple[nn.Module, ...] = ()


# A request after its number in the order of arrival at all models.
QueuedRequest = tuple[int, GenerationRequest]


@dataclass(eq=False)
class ModelSlot:
    """One model of the manager.

    Attributes:
        loaded: the model on its device, else None.
        evicted: the model while its weights are only in main memory, else None.
        load_s: seconds of the latest load.
        host_weights: of a model that was evicted before; it keeps them when it is loaded again.
    """

    model: ServedModel
    expected_bytes: int
    loaded: LoadedModel | None = None
    evicted: LoadedModel | None = None
    host_weights: HostWeights | None = None
    load_s: float = 0.0
    last_used_at: float = 0.0
    waiting: deque[QueuedRequest] = field(default_factory=deque[QueuedRequest])
    # The status before the model was closed; the counts over all times that it was.
    forwards: int = 0
    image_steps: int = 0
    last_status: EngineStatus = field(default_factory=lambda: EngineStatus(state="ready"))

    @property
    def in_memory(self) -> LoadedModel | None:
        return self.loaded or self.evicted

    def move_to_host(self) -> None:
        """Evict the model to main memory: in one copy the first time, later without one.

        Raises:
            RuntimeError: there is no memory. The model can only be closed then.
        """
        assert self.loaded is not None
        self.loaded.engine.free_memory()
        torch.cuda.synchronize()  # images are decoded on another stream
        if self.host_weights is None:
            device = torch.device("cuda", torch.cuda.current_device())
            self.host_weights = HostWeights(self.loaded.movable, device, pin=True)
        else:
            self.host_weights.unload()
        # In this order: another thread may read the status in between.
        self.evicted = self.loaded
        self.loaded = None

    def move_to_device(self) -> None:
        """Load the evicted model again, in one copy that nothing waits for.

        Raises:
            RuntimeError: the device has no memory. The model stays in main memory.
        """
        assert self.host_weights is not None
        self.host_weights.load()
        self.loaded = self.evicted
        self.evicted = None

    def close(self) -> None:
        """Drop the model, wherever its weights are; what its status counted is kept."""
        model = self.in_memory
        assert model is not None
        status = model.engine.status()
        self.forwards += status.forwards
        self.image_steps += status.image_steps
        self.last_status = status
        self.loaded = self.evicted = self.host_weights = None
