"""The models of one engine process: whose turn it is, and which of them are in memory.

One thread owns them all. Models with work take turns, one step each. Where the weights of all models do not
fit, a request for one that is not in memory waits until enough others have finished what they draw; they are
then moved out, the one used longest ago first, and the model is loaded again from its files. Requests that
came later wait behind it, whichever model they are for, so that none waits for ever.
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

from hypergen.engine.postprocess import Report
from hypergen.engine.request_errors import as_request_error
from hypergen.engine.request_queue import RequestQueue
from hypergen.errors import GenerationError, ModelError
from hypergen.events import EngineStatus, Verdict
from hypergen.model_info import ModelInfo
from hypergen.request import GenerationRequest
from hypergen.served_model import ServedModel

logger = logging.getLogger(__name__)


class ModelEngine(Protocol):
    """What generates with one model: an `Engine` or a `PipelineEngine`."""

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
        size_bytes: of its weights.
    """

    engine: ModelEngine
    description: ModelInfo
    size_bytes: int


# A request and its place in the order of arrival among all models.
_Numbered = tuple[int, GenerationRequest]


@dataclass(eq=False)
class _ModelSlot:
    """One model of the manager, in memory or not."""

    model: ServedModel
    expected_bytes: int
    loaded: LoadedModel | None = None
    last_used_at: float = 0.0
    # With the order of arrival among all models.
    waiting: deque[_Numbered] = field(default_factory=deque[_Numbered])
    forwards: int = 0  # of times in memory that are over
    image_steps: int = 0
    determinism: dict[str, Verdict] = field(default_factory=dict[str, Verdict])


class ModelManager:
    """Draws what is submitted, each request with its model.

    `submit` and `cancel` may be called from any thread; `run` is the thread that owns the models.

    Args:
        models: each with the expected size of its weights in bytes.
        limit_bytes: what the weights of all models in memory may take; None is no limit.
        load: brings a model into memory, ready to draw. What draws there calls the second argument between
            two steps of one turn, so that requests leave it meanwhile.

    Raises:
        ModelError: a model alone is larger than the limit.
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
        self._limit = math.inf if limit_bytes is None else limit_bytes
        self._load = load
        self._report = report
        self._queue = RequestQueue()
        self._arrivals = itertools.count()
        self._stepping: ModelEngine | None = None
        self._last_progress_at = time.monotonic()
        # Whoever looks at a model from another thread keeps it alive, so none may while one leaves.
        self._evicting = threading.Lock()
        for slot in self._slots.values():
            self._refuse_if_too_large(slot.model, slot.expected_bytes)

    @property
    def last_step_at(self) -> float:
        """When the engine last moved; infinite while it does what may take minutes."""
        with self._evicting:
            stepping = self._stepping
            return self._last_progress_at if stepping is None else stepping.last_step_at

    def submit(self, request: GenerationRequest) -> None:
        self._queue.submit(request)

    def cancel(self, request_id: str) -> None:
        """Take a request out before its next step; nothing more is reported of it."""
        self._queue.cancel(request_id)

    def status(self) -> EngineStatus:
        with self._evicting:
            return self._status()

    def _status(self) -> EngineStatus:
        slots = list(self._slots.values())
        there = [(slot, loaded.engine.status()) for slot in slots if (loaded := slot.loaded) is not None]
        determinism: dict[str, Verdict] = {}
        for slot in slots:
            now = next((status.determinism for of, status in there if of is slot), slot.determinism)
            # One model's sizes stand alone, as they always did; those of several say whose they are.
            prefix = f"{slot.model.id} " if len(slots) > 1 else ""
            determinism |= {prefix + size: verdict for size, verdict in now.items()}
        return EngineStatus(
            state="ready",
            device=next((status.device for _, status in there), None),
            determinism=determinism,
            forwards=sum(slot.forwards for slot in slots) + sum(status.forwards for _, status in there),
            image_steps=sum(slot.image_steps for slot in slots) + sum(s.image_steps for _, s in there),
            models=tuple(slot.model.id for slot, _ in there),
            startup_s=self.startup_s,
        )

    def load_all(self) -> tuple[ModelInfo, ...]:
        """Bring every model in once, the first one last, so that all were tried and the first are there.

        Raises:
            ModelError: one cannot be loaded, or is larger than the limit.
        """
        descriptions: list[ModelInfo] = []
        for slot in reversed(self._slots.values()):
            self._ensure_loaded(slot)
            assert slot.loaded is not None
            descriptions.append(slot.loaded.description)
        return tuple(reversed(descriptions))

    def run(self) -> Never:
        """Serve for ever."""
        sleep_s = 0.0
        while True:
            sleep_s = self.step(sleep_s)

    def step(self, sleep_s: float = 0.0) -> float:
        """Take requests in and out; then every model takes a step.

        Args:
            sleep_s: for how long to wait for a message.

        Returns:
            The `sleep_s` of the next call.
        """
        self._read_queue(sleep_s)
        self._last_progress_at = time.monotonic()
        self._dispatch_waiting()
        sleep_s = math.inf
        for slot in self._slots.values():
            if slot.loaded is None:
                continue
            engine = slot.loaded.engine
            if engine.has_requests:
                slot.last_used_at = time.monotonic()
            self._stepping = engine
            try:
                sleep_s = min(sleep_s, engine.step())
            finally:
                self._last_progress_at, self._stepping = time.monotonic(), None
        return sleep_s

    def _read_queue(self, sleep_s: float = 0.0) -> None:
        for message in self._queue.read(sleep_s):
            if isinstance(message, GenerationRequest):
                self._slot_of(message).waiting.append((next(self._arrivals), message))
            else:
                self._drop(message)

    def _slot_of(self, request: GenerationRequest) -> _ModelSlot:
        return self._slots[request.model or next(iter(self._slots))]

    def _drop(self, request_id: str) -> None:
        for slot in self._slots.values():
            slot.waiting = deque(entry for entry in slot.waiting if entry[1].id != request_id)
            if slot.loaded is not None:
                slot.loaded.engine.cancel(request_id)

    def _dispatch_waiting(self) -> None:
        """Hand the requests that wait to their models, in the order in which they came."""
        while asked := [slot for slot in self._slots.values() if slot.waiting]:
            slot = min(asked, key=lambda slot: slot.waiting[0][0])
            try:
                if not self._ensure_loaded(slot):
                    return
            except Exception as error:  # the edge where one model's trouble must not become everyone's
                logger.exception("The model %s could not be loaded again.", slot.model.id)
                if isinstance(error, ModelError):
                    error = GenerationError("The model could not be loaded again; the server's log says why.")
                for _, request in slot.waiting:
                    self._report(request.id, as_request_error(error, request))
                slot.waiting.clear()
                continue
            assert slot.loaded is not None
            while slot.waiting:
                slot.loaded.engine.add_request(slot.waiting.popleft()[1])

    def _ensure_loaded(self, slot: _ModelSlot) -> bool:
        """Have a model in memory; False while those in its place still draw.

        Raises:
            ModelError: it cannot be loaded.
        """
        if slot.loaded is not None:
            return True
        if not self._evict_until_fits(slot):
            return False
        self._last_progress_at = math.inf  # a large model takes minutes, which are no stall
        try:
            slot.loaded = self._load(slot.model, self._read_queue)
        finally:
            self._last_progress_at = time.monotonic()
        slot.last_used_at = self._last_progress_at
        slot.expected_bytes = slot.loaded.size_bytes
        self._refuse_if_too_large(slot.model, slot.expected_bytes)
        self._evict_until_fits(slot)  # with its control models and refiner it may be larger than was expected
        return True

    def _evict_until_fits(self, slot: _ModelSlot) -> bool:
        """Move others out until a model's weights fit beside the rest; False while the rest still draws."""
        there = [other for other in self._slots.values() if other.loaded is not None and other is not slot]
        while sum(other.expected_bytes for other in there) + slot.expected_bytes > self._limit:
            leaving = [other for other in there if other.loaded and not other.loaded.engine.has_requests]
            if not leaving:
                return False
            oldest = min(leaving, key=lambda other: other.last_used_at)
            self._evict(oldest)
            there.remove(oldest)
        return True

    def _evict(self, slot: _ModelSlot) -> None:
        """Give a model's memory back. Its pictures stay the same: they depend on no state that is lost."""
        assert slot.loaded is not None
        logger.info("%s is moved out of memory.", slot.model.id)
        slot.loaded.engine.close()
        with self._evicting:
            status = slot.loaded.engine.status()
            slot.forwards += status.forwards
            slot.image_steps += status.image_steps
            slot.determinism = status.determinism
            slot.loaded = None
            # What was there at the start is kept out of collections, which would now keep the model.
            gc.unfreeze()
            gc.collect()
            gc.freeze()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _refuse_if_too_large(self, model: ServedModel, size_bytes: int) -> None:
        if size_bytes > self._limit:
            raise ModelError(
                f"The weights of {model.id} take {size_bytes / 1e9:.3g} GB, more than the "
                f"{self._limit / 1e9:.3g} GB that models may take."
            )
