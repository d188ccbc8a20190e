"""The pool of engine processes, one per accelerator: least work first, and retries after a crash."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from hypergen import ipc, metrics
from hypergen.config import Settings
from hypergen.engine_client.accelerators import visible_accelerators
from hypergen.engine_client.admission import Admission
from hypergen.engine_client.engine_process import Supervisor
from hypergen.engine_client.engine_requests import EngineRequests, PoolHandle
from hypergen.engine_protocol import RequestHandle
from hypergen.errors import GenerationError, RequestError, UnavailableError, unpack
from hypergen.events import (
    Event,
    ImageFinished,
    Progress,
    RequestState,
    ServerStatus,
    Started,
    State,
)
from hypergen.model_info import ModelInfo
from hypergen.model_store.entries import state_folder
from hypergen.request import GenerationRequest
from hypergen.served_model import ServedModel

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 5
_UNAVAILABLE: dict[State, str] = {
    "loading": "The model is still loading.",
    "recovering": "The engine is restarting.",
    "draining": "The server is shutting down.",
    "failed": "The engine could not be started; see /health and the server's log for details.",
}


class EnginePool:
    """The `ImageGenerator` of a server. `start`, `stop` and `submit` belong to one event loop.

    Args:
        accelerators: one engine process is started for each, with these variables added to its environment;
            None: one per visible GPU, or a single one without a GPU.
    """

    def __init__(self, settings: Settings, accelerators: Sequence[Mapping[str, str]] | None = None) -> None:
        self._settings = settings
        self._accelerators = accelerators
        self._admission = Admission(settings.queue)
        self._engines: list[EngineRequests] = []
        self._models: tuple[ServedModel, ...] = ()
        self._draining = False
        self._drained: Counter[str] = Counter()  # how requests ended since the drain began
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, models: Sequence[ServedModel]) -> None:
        """Start the engines, each with all models; does not wait for them to load. The first model is the
        default.
        """
        self._models = tuple(models)
        start = ipc.Start(self._models, await asyncio.to_thread(_state_folder))
        accelerators = self._accelerators
        if accelerators is None:
            accelerators = await asyncio.to_thread(visible_accelerators, self._settings.engine.device)
        for environment in accelerators:
            supervisor = Supervisor(
                start,
                environment,
                on_ready=self._on_ready,
                on_message=self._on_message,
                on_lost=self._on_lost,
            )
            self._engines.append(EngineRequests(supervisor))
            supervisor.launch()
        self._tasks = [asyncio.create_task(self._watch_for_stalls()), asyncio.create_task(self._report())]

    async def stop(self) -> None:
        """Stop the engines. Unfinished requests end with 503."""
        self._draining = True
        for task in self._tasks:
            task.cancel()
        self._end_all()
        stops = (engine.supervisor.stop() for engine in self._engines)
        for error in await asyncio.gather(*stops, return_exceptions=True):
            if error is not None:  # the others have stopped
                logger.error("An engine could not be stopped.", exc_info=error)
        if self._drained.total():
            ends = ", ".join(f"{count} {state}" for state, count in self._drained.items())
            logger.info("Drained: %s.", ends)

    def drain(self, timeout_s: float) -> None:
        """Refuse new requests; admitted ones may run for `timeout_s` more, then they end with 503."""
        if not self._draining:
            logger.info("Draining %d requests, for at most %g s.", self.status().queue_size, timeout_s)
            self._draining = True
            asyncio.get_running_loop().call_later(timeout_s, self._end_all)

    def _end_all(self) -> None:
        self._admission.close(partial(_unavailable, "draining"))
        for engine in self._engines:
            for handle in [*engine.submitted.values(), *engine.suspects, *engine.held]:
                self._end(handle, _unavailable("draining"))

    def model_info(self, name: str | None = None) -> ModelInfo | None:
        infos = {info.id: info for engine in self._engines for info in engine.supervisor.model_infos}
        if not infos:
            return None
        found = None if name is None else self.find_model(name)
        return infos[found or self._models[0].id]

    def model_names(self) -> list[str]:
        return [model.id for model in self._models]

    def find_model(self, name: str) -> str | None:
        return next((model.id for model in self._models if model.is_called(name)), None)

    def status(self) -> ServerStatus:
        statuses = tuple(engine.supervisor.status for engine in self._engines)
        states: set[State] = {status.state for status in statuses} or {"loading"}
        if self._draining:
            states.add("draining")
        order: tuple[State, ...] = ("draining", "ready", "recovering", "loading", "failed")
        return ServerStatus(
            state=min(states, key=order.index),
            reason=next((status.reason for status in statuses if status.state == "failed"), None),
            running=self._admission.running,
            waiting=self._admission.waiting,
            overflow=self._admission.overflow,
            engines=statuses,
        )

    def engine_pids(self) -> list[int]:
        """The process ids of the engines, for monitoring."""
        return [engine.supervisor.pid for engine in self._engines if engine.supervisor.pid is not None]

    async def submit(
        self, request: GenerationRequest, on_event: Callable[[Event], None] | None = None
    ) -> RequestHandle:
        """See `ImageGenerator.submit`. The events may raise:

        QueueFullError: the wait in the overflow queue timed out.
        UnavailableError: no engine could be restarted, or the server shuts down.
        GenerationError: the engine failed on the request.
        """
        state = self.status().state
        if state != "ready":
            raise _unavailable(state)
        ticket = self._admission.enter(request.work, request.input_image_bytes, request.api_key, request.n)
        # From here on the request is admitted, whatever happens to the engines.
        handle = PoolHandle(request, ticket, on_event, on_cancel=self._end)
        if ticket.turn.is_set():
            self._assign(handle)
        else:
            handle.in_overflow = asyncio.create_task(self._wait_in_overflow(handle))
        return handle

    async def _wait_in_overflow(self, handle: PoolHandle) -> None:
        try:
            await self._admission.wait(handle.ticket)
        except RequestError as error:
            self._end(handle, error)
        else:
            self._assign(handle)

    def _end(self, handle: PoolHandle, error: RequestError | None = None) -> None:
        """Remove a request that finished, failed or was cancelled from its engine and the queue. Earlier
        events can still be read. Does nothing if it has ended.
        """
        if handle.ended:
            return
        complete = len(handle.finished) == handle.request.n
        for engine in self._engines:
            engine.remove(handle, cancel=not complete)
        if complete:
            request, rate = handle.request, self._settings.server.price_rate
            price = None if rate is None else request.price(rate)
            model = request.model or self._models[0].id
            metrics.record_generation(model, request.api_key.name, handle.times, price)
        done = RequestState.FINISHED if complete else RequestState.CANCELLED
        state = RequestState.FAILED if error else done
        if self._draining:
            self._drained[f"failed ({error.code})" if error else state] += 1
        handle.end(state, error)

    def _on_ready(self, supervisor: Supervisor) -> None:
        engine = self._engine_of(supervisor)
        status = supervisor.status
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in status.startup_s.items())
        names = ", ".join(model.id for model in self._models)
        logger.info(
            "Ready: engine %d of %d, %s on %s (%s).",
            self._engines.index(engine) + 1,
            len(self._engines),
            names,
            status.device,
            stages,
        )
        for other in self._engines:
            if other.supervisor.status.state != "ready":  # its held requests need not wait for it
                engine.held.extend(other.held)
                other.held.clear()
        engine.submit_next()

    def _on_lost(self, supervisor: Supervisor) -> None:
        engine = self._engine_of(supervisor)
        for handle in engine.take_all():
            if handle.crashes > 1:
                message = "The engine crashed twice while processing this request; not retrying."
                self._end(handle, GenerationError(message, code="poison"))
            elif handle.crashes and supervisor.status.state != "failed":
                engine.add(handle)
            else:
                self._assign(handle)

    def _assign(self, handle: PoolHandle) -> None:
        """Add a request to the engine with the least work, a ready one if there is any."""
        engines = [engine for engine in self._engines if engine.supervisor.status.state != "failed"]
        if engines:
            min(engines, key=lambda engine: (engine.supervisor.status.state != "ready", engine.work)).add(
                handle
            )
        else:
            self._end(handle, _unavailable("failed"))

    def _engine_of(self, supervisor: Supervisor) -> EngineRequests:
        return next(engine for engine in self._engines if engine.supervisor is supervisor)

    def _on_message(self, message: ipc.EventMessage | ipc.Failed) -> None:
        handles = (engine.submitted.get(message.request_id) for engine in self._engines)
        handle = next((handle for handle in handles if handle), None)
        if handle is None:  # cancelled meanwhile
            return
        if isinstance(message, ipc.Failed):
            self._end(handle, unpack(message.error))
            return
        match message.event:
            case Started():
                handle.state = RequestState.RUNNING
                handle.ticket.started()
            case Progress(step, steps):
                handle.ticket.progress(step / steps)
                if step == steps:
                    handle.state = RequestState.DECODING
            case ImageFinished(index=index):
                if index in handle.finished:  # again, after a crash
                    return
                handle.finished.add(index)
            case _:
                pass
        handle.put(message.event)
        if len(handle.finished) == handle.request.n:
            self._end(handle)

    async def _report(self) -> None:
        """Update the metrics that follow from the status."""
        report = metrics.StatusMetrics()
        while True:
            report.update(self.status())
            await asyncio.sleep(1)

    async def _watch_for_stalls(self) -> None:
        while True:
            await asyncio.sleep(1)
            for engine in self._engines:
                if engine.submitted:
                    engine.supervisor.kill_if_stalled(self._settings.engine.engine_stall_timeout_s)


def _state_folder() -> Path | None:
    try:
        return state_folder()
    except OSError as error:
        logger.warning("Engines keep nothing between starts: %s.", error)
        return None


def _unavailable(state: State) -> UnavailableError:
    return UnavailableError(_UNAVAILABLE[state], code=state, retry_after_s=_RETRY_AFTER_S)
