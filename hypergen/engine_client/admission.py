"""Admission: a slot in the request queue, a wait in the overflow queue, or a refusal with a retry time.

API keys share both queues by their weights, so that one of them cannot take all slots.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from hypergen.config import QueueSettings
from hypergen.engine_client.key_limits import ImageRates
from hypergen.errors import QueueFullError, RequestError
from hypergen.events import QueuePosition
from hypergen.request import ANONYMOUS, ApiKey


@dataclass(eq=False)
class AdmissionTicket:
    """One admitted request. It may wait in the overflow queue until `turn` is set, then it waits in the
    request queue until `started`, then it runs until `leave`.
    """

    admission: Admission
    api_key: ApiKey
    work: float
    input_image_bytes: int
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    engine: int | None = None  # number of the engine that runs it; None after that engine crashed
    running: bool = False
    share_done: float = 0.0  # of `work`, 0..1
    left: bool = False

    @property
    def work_left(self) -> float:
        return self.work * (1 - self.share_done)

    def started(self, engine: int = 0) -> None:
        """The first image runs on this engine: its slot in the request queue is free."""
        if self.left:
            return
        self.engine = engine
        if not self.running:  # else again, after a crash
            self.running = True
            self.admission.ticket_started(self)
        self.admission.count_busy_engines()

    def progress(self, share_done: float) -> float:
        """Record the share of `work` that is done, 0..1; returns the work done since the last call."""
        if self.left:
            return 0.0
        work = self.work * max(0.0, share_done - self.share_done)
        self.admission.throughput.record(work)
        self.share_done = share_done
        return work

    def restart(self) -> None:
        """Drop the progress after a crash; the time since the last progress does not count."""
        self.share_done, self.engine = 0.0, None
        self.admission.throughput.skip()
        self.admission.count_busy_engines()

    def leave(self) -> None:
        """Free the slot, even if events are still to be read; the second call does nothing."""
        if not self.left:
            self.left = True
            self.admission.ticket_left(self)


class Throughput:
    """Work per second of a busy engine, as an exponentially decaying average.

    Work is counted in `GenerationRequest.work`, as it is done, so that requests which end early count too.
    Busy means that at least one request runs. Times are monotonic seconds.
    """

    _HALF_LIFE_S = 60.0

    def __init__(self) -> None:
        self._work = 0.0
        self._busy_s = 0.0
        self._busy_engines = 0
        self._counted_until: float | None = None

    def busy(self, engines: int) -> None:
        """From now on, this many engines are busy."""
        self.record(0.0)
        self._busy_engines = engines
        self._counted_until = time.monotonic() if engines else None

    def record(self, work: float) -> None:
        """Add the work done since the last call."""
        now = time.monotonic()
        elapsed = 0.0 if self._counted_until is None else now - self._counted_until
        decay = 0.5 ** (elapsed / self._HALF_LIFE_S)
        self._work = self._work * decay + work
        self._busy_s = self._busy_s * decay + elapsed * self._busy_engines
        if self._counted_until is not None:
            self._counted_until = now

    def skip(self) -> None:
        """Do not count the time since the last call, in which an engine stalled or crashed."""
        if self._counted_until is not None:
            self._counted_until = time.monotonic()

    def seconds_for(self, work: float) -> float | None:
        """Estimated duration of this much work on one engine; None before the first measurement."""
        return work * self._busy_s / self._work if self._work and self._busy_s else None


class Admission:
    """At most `max_queue_size` requests wait in the request queue. Up to four times as many wait in the
    overflow queue, in order of arrival, for at most `queue_timeout_s`. The rest is refused. So is a request
    whose input images exceed the memory left by those of unfinished requests. Belongs to the event loop.

    If several API keys have unfinished requests, each has a share of both limits by its weight. A key below
    its share is admitted even if others fill the queue. The queue then exceeds the limit: nothing is dropped.
    """

    _OVERFLOW_FACTOR = 4
    _RETRY_AFTER_S = (1, 60)  # clients give up on longer waits
    _UNMEASURED_RETRY_AFTER_S = 5

    def __init__(self, settings: QueueSettings) -> None:
        self._settings = settings
        self._overflow: list[AdmissionTicket] = []  # in order of arrival
        self._tickets: list[AdmissionTicket] = []  # in order of arrival
        self._closed: Callable[[], RequestError] | None = None
        self._rates = ImageRates()
        self._waiting_of: Counter[str] = Counter()
        self.throughput = Throughput()
        self.running = 0
        self.ready_engines = 1

    @property
    def overflow(self) -> int:
        return len(self._overflow)

    @property
    def waiting(self) -> int:
        return self._waiting_of.total()

    def enter(
        self, work: float, input_image_bytes: int = 0, api_key: ApiKey = ANONYMOUS, n: int = 1
    ) -> AdmissionTicket:
        """A ticket for one request of `n` images, held until its `leave`.

        Raises:
            InvalidRequestError: the API key may never have as many images at once.
            QueueFullError: a limit of the API key, the overflow queue or the memory for input images.
            RequestError: the one given to `close`.
        """
        if self._closed:
            raise self._closed()
        self._refuse_if_limited(api_key, n)
        self._refuse_if_full(api_key, input_image_bytes)
        self._rates.record(api_key, n)
        ticket = AdmissionTicket(self, api_key, work, input_image_bytes)
        self._tickets.append(ticket)
        self._overflow.append(ticket)
        self._fill_queue()
        return ticket

    async def wait(self, ticket: AdmissionTicket) -> None:
        """Wait until the ticket is out of the overflow queue.

        Raises:
            QueueFullError: the wait exceeded `queue_timeout_s`.
            RequestError: the one given to `close`.
        """
        try:
            async with asyncio.timeout(self._settings.queue_timeout_s):
                await ticket.turn.wait()
        except TimeoutError:
            if ticket in self._overflow:  # else it left the queue at this moment
                raise self._refusal("The queue stayed full.") from None
        if self._closed:
            raise self._closed()

    def close(self, error: Callable[[], RequestError]) -> None:
        """Refuse every request from now on, including those in the overflow queue."""
        self._closed = error
        for ticket in self._overflow:
            ticket.turn.set()

    def queue_position(self, ticket: AdmissionTicket) -> QueuePosition | None:
        """None if the ticket does not wait."""
        if ticket.running or ticket.left:
            return None
        own = [other for other in self._tickets if other.api_key.name == ticket.api_key.name]
        ahead = own[: own.index(ticket)]
        own_position = sum(not other.running for other in ahead)
        own_work = sum(other.work_left for other in [*ahead, ticket])
        position, work = float(own_position), own_work
        # Meanwhile every other key gets the same, by its weight.
        others: defaultdict[ApiKey, list[AdmissionTicket]] = defaultdict(list)
        for other in self._tickets:
            if other.api_key.name != ticket.api_key.name:
                others[other.api_key].append(other)
        for key, tickets in others.items():
            weight = key.weight / ticket.api_key.weight
            waiting = sum(not other.running for other in tickets)
            position += min(waiting, weight * own_position)
            work += min(sum(other.work_left for other in tickets), weight * own_work)
        # All engines share the work ahead, but one of them generates this request.
        work = max(work / self.ready_engines, ticket.work_left)
        return QueuePosition(round(position), self.throughput.seconds_for(work))

    def count_busy_engines(self) -> None:
        engines = {ticket.engine for ticket in self._tickets} - {None}
        self.throughput.busy(len(engines))

    def ticket_started(self, ticket: AdmissionTicket) -> None:
        self.running += 1
        self._waiting_of[ticket.api_key.name] -= 1
        self._fill_queue()

    def ticket_left(self, ticket: AdmissionTicket) -> None:
        self._tickets.remove(ticket)
        if ticket in self._overflow:
            self._overflow.remove(ticket)
        elif not ticket.running:
            self._waiting_of[ticket.api_key.name] -= 1
        self._fill_queue()  # also if it ran: the shares of the other keys may have grown
        if ticket.running:
            self.running -= 1
            self.count_busy_engines()

    def retry_after_s(self) -> int:
        """Estimated whole seconds until the unfinished work is done, within what clients accept."""
        least, most = self._RETRY_AFTER_S
        work = sum(ticket.work_left for ticket in self._tickets)
        seconds = self.throughput.seconds_for(work / self.ready_engines)
        return (
            self._UNMEASURED_RETRY_AFTER_S if seconds is None else min(max(math.ceil(seconds), least), most)
        )

    def _refuse_if_limited(self, key: ApiKey, n: int) -> None:
        self._rates.check(key, n)
        unfinished = sum(ticket.api_key.name == key.name for ticket in self._tickets)
        if key.max_requests is not None and unfinished >= key.max_requests:
            raise self._refusal(f"This key's limit of unfinished requests is {key.max_requests}.")

    def _refuse_if_full(self, key: ApiKey, input_image_bytes: int) -> None:
        held = sum(ticket.input_image_bytes for ticket in self._tickets)
        # A single request is always admitted.
        if held and input_image_bytes and held + input_image_bytes > self._settings.max_input_image_mb * 1e6:
            raise self._refusal("The input images of unfinished requests fill the memory for them.")
        own = sum(ticket.api_key.name == key.name for ticket in self._overflow)
        limit = self._OVERFLOW_FACTOR * self._settings.max_queue_size if self._settings.queue_timeout_s else 0
        if not self._has_room(key) and len(self._overflow) >= limit and own >= self._share(key, limit):
            raise self._refusal("The queue is full.")

    def _fill_queue(self) -> None:
        """Move requests from the overflow queue to free slots, of the key with the fewest slots first."""
        while self._overflow:
            ticket = min(self._overflow, key=lambda ticket: self._slots_taken(ticket.api_key))
            if not self._has_room(ticket.api_key):
                return
            self._overflow.remove(ticket)
            self._waiting_of[ticket.api_key.name] += 1
            ticket.turn.set()

    def _has_room(self, key: ApiKey) -> bool:
        limit = self._settings.max_queue_size
        return self.waiting < limit or self._waiting_of[key.name] < self._share(key, limit)

    def _slots_taken(self, key: ApiKey) -> float:
        return self._waiting_of[key.name] / key.weight

    def _share(self, key: ApiKey, limit: int) -> float:
        """The part of a limit that a key has, among the keys with unfinished requests."""
        weights = {ticket.api_key.name: ticket.api_key.weight for ticket in self._tickets} | {
            key.name: key.weight
        }
        return limit * key.weight / sum(weights.values())

    def _refusal(self, message: str) -> QueueFullError:
        seconds = self.retry_after_s()
        return QueueFullError(f"{message} Try again in {seconds} s.", retry_after_s=seconds)
