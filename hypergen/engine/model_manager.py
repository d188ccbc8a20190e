"""The model manager: runs the models of one engine process, and loads and evicts them.

One thread owns all models. Models with requests run round-robin, one step each. If the weights of all models
do not fit in memory, a request for an evicted model waits until enough other models have no requests. These
are evicted, the least recently used first, and the model is loaded again. Later requests wait behind it, for
any model, so that no request waits forever.

On a GPU an evicted model moves to pinned main memory, if there is room. Then it comes back in one copy, as it
was. Otherwise it is loaded from its files, warmed up and probed again.

After some time without requests all models can be evicted, too, until a request needs them.
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
from typing import Never

import torch

from hypergen import log_setup
from hypergen.denoising.host_weights import host_bytes
from hypergen.engine.engine_status import status_of
from hypergen.engine.model_slot import LoadedModel, ModelEngine, ModelSlot
from hypergen.engine.postprocess import Report
from hypergen.engine.request_errors import as_request_error, free_cached_memory, is_out_of_memory
from hypergen.engine.request_queue import RequestQueue
from hypergen.errors import ConfigurationError, GenerationError, ModelError
from hypergen.events import EngineStatus
from hypergen.model_info import ModelInfo
from hypergen.request import GenerationRequest
from hypergen.served_model import ServedModel

logger = logging.getLogger(__name__)


class ModelManager:
    """Generates the images of submitted requests, each with its model.

    `submit` and `cancel` may be called from any thread; `run` belongs to the thread that owns the models.

    Args:
        models: each with the expected size of its weights in bytes.
        limit_bytes: for the weights of all models in memory; None: no limit.
        load: loads a model and warms it up. Its second argument reads the request queue; a full pipeline
            calls it between two denoising steps, so that requests can be cancelled meanwhile.
        host_limit_bytes: for the weights of evicted models in main memory.
        idle_unload_s: seconds without requests after which all models are evicted; None: never.

    Raises:
        ModelError: one model is larger than the limit.
    """

    def __init__(
        self,
        models: Sequence[tuple[ServedModel, int]],
        limit_bytes: float | None,
        load: Callable[[ServedModel, Callable[[], None]], LoadedModel],
        report: Report,
        host_limit_bytes: float = 0,
        idle_unload_s: float | None = None,
    ) -> None:
        self.startup_s: dict[str, float] = {}
        self._slots = {model.id: ModelSlot(model, size) for model, size in models}
        self._limit_bytes = math.inf if limit_bytes is None else limit_bytes
        self._host_limit_bytes = host_limit_bytes
        self._idle_unload_s = math.inf if idle_unload_s is None else idle_unload_s
        self._load = load
        self._report = report
        self._queue = RequestQueue()
        self._arrivals = itertools.count()
        self._running_engine: ModelEngine | None = None
        self._last_progress_at = time.monotonic()
        # A thread that reads a model's status has a reference to it, so none may do so while it is closed.
        self._closing_lock = threading.Lock()
        for slot in self._slots.values():
            self._refuse_if_too_large(slot.model, slot.expected_bytes)

    @property
    def last_step_at(self) -> float:
        """Monotonic time of the last progress; inf during work that may take minutes, for example loading."""
        with self._closing_lock:
            engine = self._running_engine
            return self._last_progress_at if engine is None else engine.last_step_at

    def submit(self, request: GenerationRequest) -> None:
        self._queue.submit(request)

    def cancel(self, request_id: str) -> None:
        """Remove a request before its next step and report no more events of it."""
        self._queue.cancel(request_id)

    def status(self) -> EngineStatus:
        with self._closing_lock:
            return status_of(list(self._slots.values()), self.startup_s)

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
        sleep_s = self._step_engines()
        self._unload_if_idle()
        return sleep_s

    def _step_engines(self) -> float:
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

    def _unload_if_idle(self) -> None:
        """Evict all models after `idle_unload_s` without requests; `_ensure_loaded` loads them again."""
        loaded = [slot for slot in self._slots.values() if slot.loaded is not None]
        if not loaded or any(slot.loaded and slot.loaded.engine.has_requests for slot in loaded):
            return
        idle_s = time.monotonic() - max(slot.last_used_at for slot in loaded)
        if idle_s < self._idle_unload_s:
            return
        logger.info("No requests for %.0f s: the models leave the device until a request comes.", idle_s)
        self._last_progress_at = math.inf  # the copy of a large model takes long: no stall
        try:
            for slot in loaded:
                log_setup.current_model.set(slot.model.id)
                self._evict(slot)
        finally:
            self._last_progress_at = time.monotonic()

    def _read_queue(self, sleep_s: float = 0.0) -> None:
        for message in self._queue.read(sleep_s):
            if isinstance(message, GenerationRequest):
                self._slot_of(message).waiting.append((next(self._arrivals), message))
            else:
                self._cancel(message)

    def _slot_of(self, request: GenerationRequest) -> ModelSlot:
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
                if isinstance(error, (ModelError, ConfigurationError)):
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

    def _ensure_loaded(self, slot: ModelSlot) -> bool:
        """Load a model unless it is in memory. Returns False if running models do not leave room for it yet.

        Raises:
            ModelError: the model cannot be loaded.
        """
        log_setup.current_model.set(slot.model.id)
        if slot.loaded is not None:
            return True
        started_at = time.monotonic()
        self._last_progress_at = math.inf  # loading a large model takes minutes: no stall
        try:
            if not self._evict_until_fits(slot):
                return False
            if slot.evicted is not None:
                slot.move_to_device()
                logger.info("Loaded %s from main memory.", slot.model.id)
            else:
                slot.loaded = self._load(slot.model, self._read_queue)
            assert slot.loaded is not None
            slot.expected_bytes = slot.loaded.size_bytes
            self._refuse_if_too_large(slot.model, slot.expected_bytes)
            self._evict_until_fits(slot)  # with ControlNets and refiner it may be larger than expected
        finally:
            slot.last_used_at = self._last_progress_at = time.monotonic()
        slot.load_s = round(self._last_progress_at - started_at, 3)
        return True

    def _evict_until_fits(self, slot: ModelSlot) -> bool:
        """Evict models without requests, the least recently used first, until the model fits in memory.

        Returns False if models with requests take too much memory.
        """
        loaded = [other for other in self._slots.values() if other.loaded is not None and other is not slot]
        while sum(other.expected_bytes for other in loaded) + slot.expected_bytes > self._limit_bytes:
            idle = [other for other in loaded if other.loaded and not other.loaded.engine.has_requests]
            if not idle:
                return False
            least_recent = min(idle, key=lambda other: other.last_used_at)
            self._evict(least_recent, slot)
            loaded.remove(least_recent)
        return True

    def _evict(self, slot: ModelSlot, successor: ModelSlot | None = None) -> None:
        """Free a model's memory. Later images are the same: they depend on no state that is lost.

        Args:
            successor: the model that is loaded next, if one is.
        """
        if not (self._make_host_room(slot, successor) and self._move_to_host(slot)):
            self._close(slot)
        free_cached_memory()
        if torch.cuda.is_available():
            torch.accelerator.empty_host_cache()

    def _make_host_room(self, slot: ModelSlot, successor: ModelSlot | None) -> bool:
        """Make room in main memory for a model's weights; returns False if there is none.

        Other models lose theirs for it: first those that are loaded, which do not need them now, then the
        least recently used. Not the successor, which is loaded next.
        """
        if slot.host_weights is not None:
            return True
        assert slot.loaded is not None
        room = self._host_limit_bytes - host_bytes(slot.loaded.movable)
        if successor is not None and successor.host_weights is not None:
            room -= successor.host_weights.nbytes
        if not slot.loaded.movable or room < 0:
            return False
        kept = [(s, s.host_weights) for s in self._slots.values() if s.host_weights and s is not successor]
        kept.sort(key=lambda entry: (entry[0].loaded is None, entry[0].last_used_at))
        while sum(weights.nbytes for _, weights in kept) > room:
            other, _ = kept.pop(0)
            other.host_weights = None
            if other.loaded is None:
                self._close(other)
        return True

    def _move_to_host(self, slot: ModelSlot) -> bool:
        """Evict a model to main memory; returns False if there is less than was expected."""
        try:
            slot.move_to_host()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
            logger.warning("No main memory for the weights of %s: %s", slot.model.id, reason)
            return False
        logger.info("Evicted %s to main memory.", slot.model.id)
        return True

    def _close(self, slot: ModelSlot) -> None:
        """Drop a model; a later request loads it from its files."""
        assert slot.in_memory is not None
        logger.info("Evicted %s from memory.", slot.model.id)
        slot.in_memory.engine.close()
        with self._closing_lock:
            slot.close()
            # Objects frozen at the start are not collected, so the model would stay in memory.
            gc.unfreeze()
            gc.collect()
            gc.freeze()

    def _refuse_if_too_large(self, model: ServedModel, size_bytes: int) -> None:
        if size_bytes > self._limit_bytes:
            raise ModelError(
                f"The weights of {model.id} take {size_bytes / 1e9:.3g} GB, more than the limit of "
                f"{self._limit_bytes / 1e9:.3g} GB for all models."
            )
