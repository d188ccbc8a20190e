"""The pool of engine processes, one per accelerator: least work first, and retries after a crash."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from hypergen import ipc, metrics
from hypergen.config import Settings
from hypergen.engine_client.accelerators import Accelerator, find_accelerators
from hypergen.engine_client.admission import Admission
from hypergen.engine_client.costs import MeasuredCosts
from hypergen.engine_client.dispatch import assign, take_held, take_waiting
from hypergen.engine_client.engine_process import EngineMessage, Supervisor
from hypergen.engine_client.engine_requests import EngineRequests, PoolHandle
from hypergen.engine_protocol import RequestHandle
from hypergen.errors import ConfigurationError, GenerationError, RequestError, UnavailableError, unpack
from hypergen.events import (
    Event,
    ForwardPass,
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
        accelerators: one engine process is started for each; None: those of the settings.
    """

    def __init__(self, settings: Settings, accelerators: Sequence[Accelerator] | None = None) -> None:
        self._settings = settings
        self._accelerators = accelerators
        self._admission = Admission(settings.queue)
        self._engines: list[EngineRequests] = []
        self._costs = MeasuredCosts()
        self._fault: str | None = None  # why no engine could be started
        self._models: tuple[ServedModel, ...] = ()
        self._draining = self._closed = False
        self._drained: Counter[str] = Counter()  # how requests ended since the drain began
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, models: Sequence[ServedModel]) -> None:
        """Start the engines, each with all models; does not wait for them to load. The first model is the
        default.
        """
        self._models = tuple(models)
        accelerators = self._accelerators
        if accelerators is None:
            try:
                accelerators = await asyncio.to_thread(find_accelerators, self._settings.engine)
            except ConfigurationError as error:  # `hypergen serve` ends with it; here /health shows it
                logger.error("%s", error)
                self._fault, accelerators = str(error), []
        state_folder = await asyncio.to_thread(_state_folder)
        start = ipc.Start(self._models, state_folder, engines=len(accelerators))
        for number, accelerator in enumerate(accelerators):
            supervisor = Supervisor(
                start,
                accelerator,
                on_ready=self._on_ready,
                on_message=self._on_message,
                on_lost=self._on_lost,
            )
            self._engines.append(EngineRequests(number, supervisor, self._costs))
            supervisor.launch()
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._report())]

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
        self._closed = True
        self._admission.close(partial(_unavailable, "draining"))
        for engine in self._engines:
            for handle in engine.handles:
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
        statuses = tuple(
            replace(engine.supervisor.status, requests=len(engine.handles)) for engine in self._engines
        )
        states: set[State] = {status.state for status in statuses}
        states = states or {"loading" if self._fault is None else "failed"}
        if self._draining:
            states.add("draining")
        order: tuple[State, ...] = ("draining", "ready", "recovering", "loading", "failed")
        return ServerStatus(
            state=min(states, key=order.index),
            reason=next((status.reason for status in statuses if status.state == "failed"), self._fault),
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
        model = request.model or self._models[0].id
        handle = PoolHandle(request, model, ticket, on_event, on_cancel=self._end)
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
            metrics.record_generation(handle.model, request.api_key.name, handle.times, price)
        done = RequestState.FINISHED if complete else RequestState.CANCELLED
        state = RequestState.FAILED if error else done
        if self._draining:
            self._drained[f"failed ({error.code})" if error else state] += 1
        handle.end(state, error)
        if not self._closed:
            for engine in self._engines:
                take_waiting(engine, self._engines)

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
        self._count_ready()
        take_held(engine, self._engines)
        take_waiting(engine, self._engines)

    def _on_lost(self, supervisor: Supervisor) -> None:
        engine = self._engine_of(supervisor)
        self._count_ready()
        for handle in engine.take_all():
            if handle.crashes > 1:
                message = "The engine crashed twice while processing this request; not retrying."
                self._end(handle, GenerationError(message, code="poison"))
            elif handle.crashes and supervisor.status.state != "failed":
                engine.add(handle)
            else:
                self._assign(handle)

    def _assign(self, handle: PoolHandle) -> None:
        if not assign(handle, self._engines):
            self._end(handle, _unavailable("failed"))

    def _count_ready(self) -> None:
        self._admission.ready_engines = max(1, sum(engine.is_ready for engine in self._engines))

    def _engine_of(self, supervisor: Supervisor) -> EngineRequests:
        return next(engine for engine in self._engines if engine.supervisor is supervisor)

    def _on_message(self, supervisor: Supervisor, message: EngineMessage) -> None:
        engine = self._engine_of(supervisor)
        if isinstance(message, ForwardPass):
            metrics.record_forward(message)
            self._costs.record_forward(engine.number, message.model, message.seconds)
            return
        handle = engine.submitted.get(message.request_id)
        if handle is None:  # cancelled meanwhile, or moved to another engine
            return
        if isinstance(message, ipc.Failed):
            self._end(handle, unpack(message.error))
            return
        match message.event:
            case Started():
                handle.state = RequestState.RUNNING
                handle.ticket.started(engine.number)
            case Progress(step=step, steps=steps):
                work = handle.ticket.progress(step / steps)
                self._costs.record_work(engine.number, handle.model, work)
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

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(1)
            any_ready = any(engine.is_ready for engine in self._engines)
            for engine in self._engines:
                if engine.submitted:
                    engine.supervisor.kill_if_stalled(self._settings.engine.engine_stall_timeout_s)
                if any_ready:  # else the server has failed, and whatever runs it restarts it
                    engine.supervisor.retry()


def _state_folder() -> Path | None:
    try:
        return state_folder()
    except OSError as error:
        logger.warning("Engines keep nothing between starts: %s.", error)
        return None


def _unavailable(state: State) -> UnavailableError:
    return UnavailableError(_UNAVAILABLE[state], code=state, retry_after_s=_RETRY_AFTER_S)
