"""The model manager: runs the models of one engine process, and loads and evicts them.

One thread owns all models. Models with requests run round-robin, one step each. If the weights of all models
do not fit in memory, a request for an evicted model waits until enough other models have no requests. These
are evicted, the least recently used first, and the model is loaded from its files again. Later requests wait
behind it, for any model, so that no request waits forever.
"""

from __future__ import annotations

import gc
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Never, Protocol

import torch

from hypergen import log_setup
from hypergen.cache_lookups import cache_lookups
from hypergen.engine.device_memory import memory_bytes
from hypergen.engine.postprocess import Report
from hypergen.engine.request_errors import as_request_error
from hypergen.engine.request_queue import RequestQueue
from hypergen.errors import GenerationError, ModelError
from hypergen.events import EngineStatus
from hypergen.model_info import ModelInfo
from hypergen.request import GenerationRequest
from hypergen.served_model import ServedModel

logger = logging.getLogger(__name__)


class ModelEngine(Protocol):
    """The engine of one model: an `Engine` or a `PipelineEngine`."""

    last_step_at: float

    @property
    def has_requests(self) -> bool: ...
    def add_request(self, request: GenerationRequest) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def step(self) -> float: ...
    def status(self) -> EngineStatus: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        size_bytes: size of its weights.
    """

    engine: ModelEngine
    model_info: ModelInfo
    size_bytes: int


# A request after its number in the order of arrival at all models.
_QueuedRequest = tuple[int, GenerationRequest]


@dataclass(eq=False)
class _ModelSlot:
    """One model of the manager, loaded or evicted."""

    model: ServedModel
    expected_bytes: int
    loaded: LoadedModel | None = None
    load_s: float = 0.0  # seconds of the latest load
    last_used_at: float = 0.0
    waiting: deque[_QueuedRequest] = field(default_factory=deque[_QueuedRequest])
    # The status before the last eviction; the counts over all evictions.
    forwards: int = 0
    image_steps: int = 0
    last_status: EngineStatus = field(default_factory=lambda: EngineStatus(state="ready"))


class ModelManager:
    """Generates the images of submitted requests, each with its model.

    `submit` and `cancel` may be called from any thread; `run` belongs to the thread that owns the models.

    Args:
        models: each with the expected size of its weights in bytes.
        limit_bytes: for the weights of all models in memory; None: no limit.
        load: loads a model and warms it up. Its second argument reads the request queue; a full pipeline
            calls it between two denoising steps, so that requests can be cancelled meanwhile.

    Raises:
        ModelError: one model is larger than the limit.
    """

    def __init__(
        self,
        models: Sequence[tuple[ServedModel, int]],
        limit_bytes: float | None,
        load: Callable[[ServedModel, Callable[[], None]], LoadedModel],
        report: Report,
    ) -> None:
        self.startup_s: dict[str, float] = {}
        self._slots = {model.id: _ModelSlot(model, size) for model, size in models}
        self._limit_bytes = math.inf if limit_bytes is None else limit_bytes
        self._load = load
        self._report = report
        self._queue = RequestQueue()
        self._arrivals = itertools.count()
        self._running_engine: ModelEngine | None = None
        self._last_progress_at = time.monotonic()
        # A thread that reads a model's status has a reference to it, so none may do so during an eviction.
        self._eviction_lock = threading.Lock()
        for slot in self._slots.values():
            self._refuse_if_too_large(slot.model, slot.expected_bytes)

    @property
    def last_step_at(self) -> float:
        """Monotonic time of the last progress; inf during work that may take minutes, for example loading."""
        with self._eviction_lock:
            engine = self._running_engine
            return self._last_progress_at if engine is None else engine.last_step_at

    def submit(self, request: GenerationRequest) -> None:
        self._queue.submit(request)

    def cancel(self, request_id: str) -> None:
        """Remove a request before its next step and report no more events of it."""
        self._queue.cancel(request_id)

    def status(self) -> EngineStatus:
        with self._eviction_lock:
            return self._status()

    def _status(self) -> EngineStatus:
        slots = list(self._slots.values())
        loaded = [(slot, model.engine.status()) for slot in slots if (model := slot.loaded) is not None]
        latest = {slot.model.id: slot.last_status for slot in slots}
        latest |= {slot.model.id: status for slot, status in loaded}
        # Sizes have a model id only if there are several models.
        prefixes = {model_id: f"{model_id} " if len(slots) > 1 else "" for model_id in latest}
        return EngineStatus(
            state="ready",
            device=next((status.device for _, status in loaded), None),
            determinism={
                prefixes[model_id] + size: verdict
                for model_id, status in latest.items()
                for size, verdict in status.determinism.items()
            },
            row_counts={
                prefixes[model_id] + size: counts
                for model_id, status in latest.items()
                for size, counts in status.row_counts.items()
            },
            forwards=sum(slot.forwards for slot in slots) + sum(status.forwards for _, status in loaded),
            image_steps=sum(slot.image_steps for slot in slots) + sum(s.image_steps for _, s in loaded),
            models=tuple(slot.model.id for slot, _ in loaded),
            startup_s=self.startup_s,
            load_s={slot.model.id: slot.load_s for slot in slots if slot.load_s},
            memory_bytes=memory_bytes(),
            loras=sum(status.loras for _, status in loaded),
            cache_lookups=cache_lookups(),
        )

    def load_all(self) -> tuple[ModelInfo, ...]:
        """Load every model once, in reverse order, so that all are tested and the first ones stay in memory.

        Raises:
            ModelError: a model cannot be loaded or is larger than the limit.
        """
        model_infos: list[ModelInfo] = []
        for slot in reversed(self._slots.values()):
            self._ensure_loaded(slot)
            assert slot.loaded is not None
            model_infos.append(slot.loaded.model_info)
        return tuple(reversed(model_infos))

    def run(self) -> Never:
        """Run forever."""
        sleep_s = 0.0
        while True:
            sleep_s = self.step(sleep_s)

    def step(self, sleep_s: float = 0.0) -> float:
        """Read the request queue, then run one step of every model in memory.

        Args:
            sleep_s: how long to wait for a message.

        Returns:
            `sleep_s` of the next call.
        """
        self._read_queue(sleep_s)
        self._last_progress_at = time.monotonic()
        self._dispatch_waiting()
        sleep_s = math.inf
        for slot in self._slots.values():
            if slot.loaded is None:
                continue
            engine = slot.loaded.engine
            log_setup.current_model.set(slot.model.id)
            if engine.has_requests:
                slot.last_used_at = time.monotonic()
            self._running_engine = engine
            try:
                sleep_s = min(sleep_s, engine.step())
            finally:
                self._last_progress_at, self._running_engine = time.monotonic(), None
        return sleep_s

    def _read_queue(self, sleep_s: float = 0.0) -> None:
        for message in self._queue.read(sleep_s):
            if isinstance(message, GenerationRequest):
                self._slot_of(message).waiting.append((next(self._arrivals), message))
            else:
                self._cancel(message)

    def _slot_of(self, request: GenerationRequest) -> _ModelSlot:
        return self._slots[request.model or next(iter(self._slots))]

    def _cancel(self, request_id: str) -> None:
        for slot in self._slots.values():
            slot.waiting = deque(entry for entry in slot.waiting if entry[1].id != request_id)
            if slot.loaded is not None:
                slot.loaded.engine.cancel(request_id)

    def _dispatch_waiting(self) -> None:
        """Add the waiting requests to their models' engines, in order of arrival."""
        while waiting := [slot for slot in self._slots.values() if slot.waiting]:
            slot = min(waiting, key=lambda slot: slot.waiting[0][0])
            try:
                if not self._ensure_loaded(slot):
                    return
            except Exception as error:  # Isolate the failure: only this model's requests fail.
                ids = ", ".join(request.id for _, request in slot.waiting)
                logger.exception(
                    "Model %s could not be loaded again; failing requests %s.", slot.model.id, ids
                )
                if isinstance(error, ModelError):
                    error = GenerationError(
                        "The model could not be loaded again; see the server's log for details."
                    )
                for _, request in slot.waiting:
                    self._report(request.id, as_request_error(error, request))
                slot.waiting.clear()
                continue
            assert slot.loaded is not None
            while slot.waiting:
                slot.loaded.engine.add_request(slot.waiting.popleft()[1])

    def _ensure_loaded(self, slot: _ModelSlot) -> bool:
        """Load a model unless it is in memory. Returns False if running models do not leave room for it yet.

        Raises:
            ModelError: the model cannot be loaded.
        """
        log_setup.current_model.set(slot.model.id)
        if slot.loaded is not None:
            return True
        if not self._evict_until_fits(slot):
            return False
        started_at = time.monotonic()
        self._last_progress_at = math.inf  # loading a large model takes minutes: no stall
        try:
            slot.loaded = self._load(slot.model, self._read_queue)
        finally:
            self._last_progress_at = time.monotonic()
        slot.load_s = round(self._last_progress_at - started_at, 3)
        slot.last_used_at = self._last_progress_at
        slot.expected_bytes = slot.loaded.size_bytes
        self._refuse_if_too_large(slot.model, slot.expected_bytes)
        self._evict_until_fits(slot)  # with ControlNets and refiner it may be larger than expected
        return True

    def _evict_until_fits(self, slot: _ModelSlot) -> bool:
        """Evict models without requests, the least recently used first, until the model fits in memory.

        Returns False if models with requests take too much memory.
        """
        loaded = [other for other in self._slots.values() if other.loaded is not None and other is not slot]
        while sum(other.expected_bytes for other in loaded) + slot.expected_bytes > self._limit_bytes:
            idle = [other for other in loaded if other.loaded and not other.loaded.engine.has_requests]
            if not idle:
                return False
            least_recent = min(idle, key=lambda other: other.last_used_at)
            self._evict(least_recent)
            loaded.remove(least_recent)
        return True

    def _evict(self, slot: _ModelSlot) -> None:
        """Free a model's memory. Later images are the same: they depend on no state that is lost."""
        assert slot.loaded is not None
        logger.info("Evicted %s from memory.", slot.model.id)
        slot.loaded.engine.close()
        with self._eviction_lock:
            status = slot.loaded.engine.status()
            slot.forwards += status.forwards
            slot.image_steps += status.image_steps
            slot.last_status = status
            slot.loaded = None
            # Objects frozen at the start are not collected, so the model would stay in memory.
            gc.unfreeze()
            gc.collect()
            gc.freeze()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _refuse_if_too_large(self, model: ServedModel, size_bytes: int) -> None:
        if size_bytes > self._limit_bytes:
            raise ModelError(
                f"The weights of {model.id} take {size_bytes / 1e9:.3g} GB, more than the limit of "
                f"{self._limit_bytes / 1e9:.3g} GB for all models."
            )
