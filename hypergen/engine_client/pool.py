"""The pool: engine processes, one per accelerator, least work first; what a dead one had is drawn again."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from hypergen import ipc
from hypergen.config import Settings
from hypergen.engine_client.accelerators import visible_accelerators
from hypergen.engine_client.admission import Admission, Place
from hypergen.engine_client.engine_process import Supervisor
from hypergen.errors import GenerationError, RequestError, UnavailableError, unpack
from hypergen.events import Event, GeneratorStatus, ImageFinished, Outlook, Progress, Started, State
from hypergen.model_info import ModelDescription
from hypergen.request import GenerationRequest
from hypergen.served_model import ServedModel

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 5
_UNAVAILABLE: dict[State, str] = {
    "loading": "The model is still loading.",
    "recovering": "The engine is being started again.",
    "draining": "The server is shutting down.",
    "failed": "The engine could not be started; the server's log and /health say why.",
}


@dataclass(eq=False)
class _Call:
    """One request on its way through an engine."""

    request: GenerationRequest
    place: Place
    events: asyncio.Queue[Event | RequestError] = field(default_factory=asyncio.Queue)
    started: bool = False
    finished: set[int] = field(default_factory=set)  # images that came, whether the client read them or not
    losses: int = 0  # engines that died while they had it
    crashes: int = 0  # those of them that it may have killed


@dataclass(eq=False)
class _EngineCalls:
    """The calls of one engine.

    After a crash, what was running is under suspicion and runs alone, one by one, while everything else is
    held back: so a request that kills engines is found, and nobody else dies of it twice.
    """

    supervisor: Supervisor
    submitted: dict[str, _Call] = field(default_factory=dict)
    suspects: deque[_Call] = field(default_factory=deque)
    held: deque[_Call] = field(default_factory=deque)

    @property
    def work(self) -> float:
        calls = [*self.submitted.values(), *self.suspects, *self.held]
        return sum(call.request.work for call in calls)

    def add(self, call: _Call) -> None:
        (self.suspects if call.crashes else self.held).append(call)
        self.submit_next()

    def submit_next(self) -> None:
        if self.supervisor.status.state != "ready":
            return
        if self.suspects:
            if not self.submitted:
                self._submit(self.suspects.popleft())
            return
        if any(call.crashes for call in self.submitted.values()):
            return
        while self.held:
            self._submit(self.held.popleft())

    def _submit(self, call: _Call) -> None:
        self.submitted[call.request.id] = call
        self.supervisor.send(ipc.Submit(call.request))

    def remove(self, call: _Call, cancel: bool) -> None:
        if self.submitted.pop(call.request.id, None) and cancel:
            self.supervisor.send(ipc.Cancel(call.request.id))
        for line in (self.suspects, self.held):
            with suppress(ValueError):
                line.remove(call)
        self.submit_next()

    def give_up_calls(self) -> list[_Call]:
        """The engine is gone: all calls, with suspicion on those that may have killed it."""
        for call in self.submitted.values():
            call.losses += 1
            # One that had not started is innocent the first time; then starting may be what kills.
            call.crashes += call.started or call.losses > 1
            call.started = False
            call.place.restart()
        calls = [*self.submitted.values(), *self.suspects, *self.held]
        for line in (self.submitted, self.suspects, self.held):
            line.clear()
        return calls


class EnginePool:
    """The `ImageGenerator` of a server. `start`, `stop` and `generate` belong to one event loop.

    Args:
        accelerators: one engine process is started for each, with these variables added to its environment;
            absent: one for each GPU that is visible, else a single one.
    """

    def __init__(self, settings: Settings, accelerators: Sequence[Mapping[str, str]] | None = None) -> None:
        self._settings = settings
        self._accelerators = accelerators
        self._admission = Admission(settings.queue)
        self._engines: list[_EngineCalls] = []
        self._models: tuple[ServedModel, ...] = ()
        self._draining = False
        self._watch: asyncio.Task[None] | None = None

    async def start(self, models: Sequence[ServedModel]) -> None:
        """Start the engines, each with all models; does not wait for them to load. The first model draws what
        names none.
        """
        self._models = tuple(models)
        start = ipc.Start(self._models)
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
            self._engines.append(_EngineCalls(supervisor))
            supervisor.launch()
        self._watch = asyncio.create_task(self._watch_for_stalls())

    async def stop(self) -> None:
        """End the engines. Requests that still run end with 503."""
        self._draining = True
        if self._watch:
            self._watch.cancel()
        self._end_all_calls()
        stops = (engine.supervisor.stop() for engine in self._engines)
        for error in await asyncio.gather(*stops, return_exceptions=True):
            if error is not None:  # the others have stopped all the same
                logger.error("An engine could not be stopped.", exc_info=error)

    def drain(self, timeout_s: float) -> None:
        """Refuse new requests; those accepted go on for so many seconds, then they end with 503."""
        if not self._draining:
            self._draining = True
            asyncio.get_running_loop().call_later(timeout_s, self._end_all_calls)

    def _end_all_calls(self) -> None:
        self._admission.close(partial(_unavailable, "draining"))
        for engine in self._engines:
            for call in [*engine.submitted.values(), *engine.suspects, *engine.held]:
                self._end(call, _unavailable("draining"))

    def describe(self, name: str | None = None) -> ModelDescription | None:
        every = (engine.supervisor.descriptions for engine in self._engines)
        known = {description.id: description for descriptions in every for description in descriptions}
        if not known:
            return None
        named = (model.id for model in self._models if name is not None and model.is_called(name))
        return known[next(named, self._models[0].id)]

    def status(self) -> GeneratorStatus:
        statuses = tuple(engine.supervisor.status for engine in self._engines)
        states: set[State] = {status.state for status in statuses} or {"loading"}
        if self._draining:
            states.add("draining")
        order: tuple[State, ...] = ("draining", "ready", "recovering", "loading", "failed")
        return GeneratorStatus(
            state=min(states, key=order.index),
            reason=next((status.reason for status in statuses if status.state == "failed"), None),
            running=self._admission.running,
            waiting=self._admission.waiting,
            at_the_door=self._admission.at_the_door,
            engines=statuses,
        )

    def outlook(self, request_id: str) -> Outlook | None:
        return self._admission.outlook(request_id)

    def engine_pids(self) -> list[int]:
        """The process ids of the engines, for whoever watches from outside."""
        return [engine.supervisor.pid for engine in self._engines if engine.supervisor.pid is not None]

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """See `ImageGenerator.generate`.

        Raises:
            UnavailableError: no engine is ready, or the one that had the request did not come back.
            QueueFullError: there is no room, not even at the door.
            GenerationError: drawing failed.
        """
        self._refuse_unless_ready()
        place = await self._admission.enter(request.work, request.id, request.picture_bytes)
        # Accepted: what happens to the engines from here on is no reason to refuse it.
        call = _Call(request, place)
        unread = request.n
        try:
            self._assign(call)
            while unread:
                event = await call.events.get()
                if isinstance(event, RequestError):
                    raise event
                unread -= isinstance(event, ImageFinished)
                yield event
        finally:
            self._end(call)

    def _end(self, call: _Call, error: RequestError | None = None) -> None:
        """Take a call out of its engine and the queue, when the engine is done with it or nobody wants it;
        its consumer may still read what came.
        """
        for engine in self._engines:
            engine.remove(call, cancel=len(call.finished) < call.request.n)
        call.place.leave()
        if error is not None:
            call.events.put_nowait(error)

    def _refuse_unless_ready(self) -> None:
        state = self.status().state
        if state != "ready":
            raise _unavailable(state)

    def _on_ready(self, supervisor: Supervisor) -> None:
        engine = self._engine_of(supervisor)
        for other in self._engines:
            if other.supervisor.status.state != "ready":  # what waits for it need not wait longer
                engine.held.extend(other.held)
                other.held.clear()
        engine.submit_next()

    def _on_lost(self, supervisor: Supervisor) -> None:
        engine = self._engine_of(supervisor)
        for call in engine.give_up_calls():
            if call.crashes > 1:
                message = "The engine crashed twice while processing this request; not retrying."
                self._end(call, GenerationError(message, code="poison"))
            elif call.crashes and supervisor.status.state != "failed":
                engine.add(call)
            else:
                self._assign(call)

    def _assign(self, call: _Call) -> None:
        """To the engine with the least work, a ready one if there is any."""
        engines = [engine for engine in self._engines if engine.supervisor.status.state != "failed"]
        if engines:
            min(engines, key=lambda engine: (engine.supervisor.status.state != "ready", engine.work)).add(
                call
            )
        else:
            self._end(call, _unavailable("failed"))

    def _engine_of(self, supervisor: Supervisor) -> _EngineCalls:
        return next(engine for engine in self._engines if engine.supervisor is supervisor)

    def _on_message(self, message: ipc.Happened | ipc.Failed) -> None:
        calls = (engine.submitted.get(message.request_id) for engine in self._engines)
        call = next((call for call in calls if call), None)
        if call is None:  # cancelled while the message was on its way
            return
        if isinstance(message, ipc.Failed):
            self._end(call, unpack(message.error))
            return
        match message.event:
            case Started():
                call.started = True
                call.place.started()
            case Progress(step, steps):
                call.place.progress(step / steps)
            case ImageFinished(index=index):
                if index in call.finished:  # again, after a crash
                    return
                call.finished.add(index)
            case _:
                pass
        call.events.put_nowait(message.event)
        if len(call.finished) == call.request.n:
            self._end(call)

    async def _watch_for_stalls(self) -> None:
        while True:
            await asyncio.sleep(1)
            for engine in self._engines:
                if engine.submitted:
                    engine.supervisor.kill_if_stalled(self._settings.engine.engine_stall_timeout_s)


def _unavailable(state: State) -> UnavailableError:
    return UnavailableError(_UNAVAILABLE[state], code=state, retry_after_s=_RETRY_AFTER_S)
