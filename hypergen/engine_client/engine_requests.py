"""The requests of one engine, and the handles by which the HTTP half follows them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from hypergen import ipc
from hypergen.engine_client.admission import AdmissionTicket
from hypergen.engine_client.costs import MeasuredCosts, estimated_seconds
from hypergen.engine_client.engine_process import Supervisor
from hypergen.engine_protocol import RequestHandle
from hypergen.errors import RequestError
from hypergen.events import Event, QueuePosition, RequestState
from hypergen.request import GenerationRequest
from hypergen.request_times import RequestTimes


@dataclass(eq=False)
class PoolHandle(RequestHandle):
    """One request, from admission to its last event."""

    request: GenerationRequest
    model: str  # its id
    ticket: AdmissionTicket
    on_event: Callable[[Event], None] | None
    on_cancel: Callable[[PoolHandle], None]
    state: RequestState = RequestState.WAITING
    finished: set[int] = field(default_factory=set)  # indices of the images received, read or not
    engine_exits: int = 0  # engines that exited while they had the request
    crashes: int = 0  # those of them that it may have crashed
    times: RequestTimes = field(default_factory=RequestTimes)
    in_overflow: asyncio.Task[None] | None = None
    _events: asyncio.Queue[Event | RequestError | None] = field(default_factory=asyncio.Queue)

    async def __anext__(self) -> Event:
        event = await self._events.get()
        if event is None:
            self._events.put_nowait(None)  # for the next call
            raise StopAsyncIteration
        if isinstance(event, RequestError):
            raise event
        return event

    @property
    def ended(self) -> bool:
        return self.state in (RequestState.FINISHED, RequestState.CANCELLED, RequestState.FAILED)

    def queue_position(self) -> QueuePosition | None:
        return self.ticket.admission.queue_position(self.ticket)

    def cancel(self) -> None:
        self.on_cancel(self)

    def put(self, event: Event) -> None:
        self.times.observe(event)
        if self.on_event:
            self.on_event(event)
        self._events.put_nowait(event)

    def end(self, state: RequestState, error: RequestError | None) -> None:
        self.state = state
        if error is not None:
            self._events.put_nowait(error)
        self._events.put_nowait(None)
        self.request = self.request.without_input_images()  # a slow consumer would keep them in memory
        self.ticket.leave()
        if self.in_overflow is not None:
            self.in_overflow.cancel()


@dataclass(eq=False)
class EngineRequests:
    """The requests of one engine, and its number in the pool.

    After a crash, the requests that were running are suspects: they run alone, one after another, and the
    other requests are held. So a request that crashes engines is found, and any other restarts at most once.
    """

    number: int
    supervisor: Supervisor
    costs: MeasuredCosts
    submitted: dict[str, PoolHandle] = field(default_factory=dict)
    suspects: deque[PoolHandle] = field(default_factory=deque)
    held: deque[PoolHandle] = field(default_factory=deque)

    @property
    def is_ready(self) -> bool:
        return self.supervisor.status.state == "ready"

    @property
    def handles(self) -> list[PoolHandle]:
        return [*self.submitted.values(), *self.suspects, *self.held]

    def oldest_waiting(self) -> PoolHandle | None:
        """A request that another engine may run: it has not started here, and crashed no engine."""
        handles = (*self.submitted.values(), *self.held)
        return next((h for h in handles if h.state is RequestState.WAITING and not h.crashes), None)

    def estimated_seconds(self, *more: PoolHandle) -> float:
        """Until all requests are done, with these in addition."""
        seconds = [
            (handle.model, self.costs.seconds_for(self.number, handle.model, handle.ticket.work_left))
            for handle in (*self.handles, *more)
        ]
        status = self.supervisor.status
        return estimated_seconds(seconds, status.models, status.load_s)

    def add(self, handle: PoolHandle) -> None:
        (self.suspects if handle.crashes else self.held).append(handle)
        self.submit_next()

    def submit_next(self) -> None:
        if not self.is_ready:
            return
        if self.suspects:
            if not self.submitted:
                self._submit(self.suspects.popleft())
            return
        if any(handle.crashes for handle in self.submitted.values()):
            return
        while self.held:
            self._submit(self.held.popleft())

    def _submit(self, handle: PoolHandle) -> None:
        self.submitted[handle.request.id] = handle
        self.supervisor.send(ipc.Submit(handle.request))

    def remove(self, handle: PoolHandle, cancel: bool) -> None:
        if self.submitted.pop(handle.request.id, None) and cancel:
            self.supervisor.send(ipc.Cancel(handle.request.id))
        for waiting in (self.suspects, self.held):
            if handle in waiting:  # the error of `remove` would contain the request's images as text
                waiting.remove(handle)
        self.submit_next()

    def take_all(self) -> list[PoolHandle]:
        """Remove all requests of an engine that exited; count a crash for those that may have caused it."""
        for handle in self.submitted.values():
            handle.engine_exits += 1
            # A request that had not started is a suspect only the second time: its start may be the cause.
            handle.crashes += handle.state is not RequestState.WAITING or handle.engine_exits > 1
            handle.state = RequestState.WAITING
            handle.ticket.restart()
        handles = self.handles
        for requests in (self.submitted, self.suspects, self.held):
            requests.clear()
        return handles
