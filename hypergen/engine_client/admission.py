"""Admission: a place in the queue, a wait in the overflow queue, or a refusal that says when to come back."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from hypergen.config import QueueSettings
from hypergen.errors import QueueFullError, RequestError
from hypergen.events import QueuePosition


@dataclass(eq=False)
class AdmissionTicket:
    """One request that was not refused. It may have to wait in the overflow queue until `turn` comes, then it
    waits in the queue until `started` is called, then it runs until `leave`.
    """

    admission: Admission
    work: float
    picture_bytes: int = 0
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    running: bool = False
    share_done: float = 0.0  # of its work, 0..1
    left: bool = False

    @property
    def work_left(self) -> float:
        return self.work * (1 - self.share_done)

    def started(self) -> None:
        """The request has taken its first step: its place in the queue is free."""
        if self.left:
            return
        if self.running:  # once more, in an engine that had to be loaded first
            self.admission.rate.skip()
        else:
            self.running = True
            self.admission.ticket_started()

    def progress(self, share_done: float) -> None:
        """So much of its work is done, 0..1."""
        if not self.left:
            self.admission.rate.record(self.work * max(0.0, share_done - self.share_done))
            self.share_done = share_done

    def restart(self) -> None:
        """What was done is lost; the time since the last progress counts for nothing."""
        self.share_done = 0.0
        self.admission.rate.skip()

    def leave(self) -> None:
        """Leave the queue, whoever still reads the answer; the second call does nothing."""
        if not self.left:
            self.left = True
            self.admission.ticket_left(self)


class WorkRate:
    """How much work is done per busy second, the distant past fading.

    Work is counted in `GenerationRequest.work`, as it is done: also that of requests which end early. Busy is
    when anything runs. Times are monotonic seconds.
    """

    _HALF_LIFE_S = 60.0

    def __init__(self) -> None:
        self._work = 0.0
        self._busy_s = 0.0
        self._counted_until: float | None = None

    def busy(self, is_busy: bool) -> None:
        self.record(0.0)
        self._counted_until = time.monotonic() if is_busy else None

    def record(self, work: float) -> None:
        """So much was done since the last call."""
        now = time.monotonic()
        elapsed = 0.0 if self._counted_until is None else now - self._counted_until
        fading = 0.5 ** (elapsed / self._HALF_LIFE_S)
        self._work = self._work * fading + work
        self._busy_s = self._busy_s * fading + elapsed
        if self._counted_until is not None:
            self._counted_until = now

    def skip(self) -> None:
        """Do not count the time since the last call: an engine that stalled or crashed did nothing in it."""
        if self._counted_until is not None:
            self._counted_until = time.monotonic()

    def seconds_for(self, work: float) -> float | None:
        """How long this much work takes; None as long as nothing was measured."""
        return work * self._busy_s / self._work if self._work and self._busy_s else None


class Admission:
    """At most `max_queue_size` requests wait for the engine; more wait in the overflow queue, first come
    first served, for at most `queue_timeout_s` and at most four times as many; the rest is refused. So are
    requests whose input images do not fit into memory beside those of others: they would hold them there too.
    Lives on the event loop.
    """

    _OVERFLOW_FACTOR = 4
    _RETRY_AFTER_S = (1, 60)  # clients give up on longer ones (contract, section 6)
    _UNMEASURED_RETRY_AFTER_S = 5

    def __init__(self, settings: QueueSettings) -> None:
        self._settings = settings
        self._overflow: deque[AdmissionTicket] = deque()
        self._tickets: list[AdmissionTicket] = []  # as they came
        self._closed: Callable[[], RequestError] | None = None
        self.rate = WorkRate()
        self.waiting = 0
        self.running = 0

    @property
    def overflow(self) -> int:
        return len(self._overflow)

    def enter(self, work: float, picture_bytes: int = 0) -> AdmissionTicket:
        """A ticket for one request, held until its `leave`.

        Raises:
            QueueFullError: the overflow queue or the memory for input images is full; `retry_after_s` says
                when to come back.
            RequestError: the one given to `close`.
        """
        if self._closed:
            raise self._closed()
        self._refuse_if_full(picture_bytes)
        ticket = AdmissionTicket(self, work, picture_bytes)
        if self._has_room():
            self.waiting += 1
            ticket.turn.set()
        else:
            self._overflow.append(ticket)
        self._tickets.append(ticket)
        return ticket

    async def wait(self, ticket: AdmissionTicket) -> None:
        """Wait until the ticket is out of the overflow queue.

        Raises:
            QueueFullError: that took too long.
            RequestError: the one given to `close`.
        """
        try:
            async with asyncio.timeout(self._settings.queue_timeout_s):
                await ticket.turn.wait()
        except TimeoutError:
            if ticket in self._overflow:  # else its turn came in this very moment
                raise self._refusal("The queue stayed full.") from None
        if self._closed:
            raise self._closed()

    def close(self, error: Callable[[], RequestError]) -> None:
        """Refuse everything from now on, also what waits in the overflow queue."""
        self._closed = error
        for ticket in self._overflow:
            ticket.turn.set()

    def queue_position(self, ticket: AdmissionTicket) -> QueuePosition | None:
        """None if the ticket does not wait."""
        if ticket.running or ticket.left:
            return None
        ahead = self._tickets[: self._tickets.index(ticket)]
        work = sum(other.work_left for other in [*ahead, ticket])
        return QueuePosition(sum(not other.running for other in ahead), self.rate.seconds_for(work))

    def ticket_started(self) -> None:
        if not self.running:
            self.rate.busy(True)
        self.running += 1
        self._leave_queue()

    def ticket_left(self, ticket: AdmissionTicket) -> None:
        self._tickets.remove(ticket)
        if ticket in self._overflow:
            self._overflow.remove(ticket)
            return
        if not ticket.running:
            self._leave_queue()
            return
        self.running -= 1
        if self.running:
            self.rate.record(0.0)
        else:
            self.rate.busy(False)

    def retry_after_s(self) -> int:
        """Whole seconds until the work ahead is done at the measured rate, within what clients accept."""
        least, most = self._RETRY_AFTER_S
        seconds = self.rate.seconds_for(sum(ticket.work_left for ticket in self._tickets))
        return (
            self._UNMEASURED_RETRY_AFTER_S if seconds is None else min(max(math.ceil(seconds), least), most)
        )

    def _refuse_if_full(self, picture_bytes: int) -> None:
        held = sum(ticket.picture_bytes for ticket in self._tickets)
        # One request alone always fits.
        if held and picture_bytes and held + picture_bytes > self._settings.max_pictures_mb * 1e6:
            raise self._refusal("The input images of unfinished requests fill the memory for them.")
        overflow = (
            self._OVERFLOW_FACTOR * self._settings.max_queue_size if self._settings.queue_timeout_s else 0
        )
        if not self._has_room() and len(self._overflow) >= overflow:
            raise self._refusal("The queue is full.")

    def _has_room(self) -> bool:
        return self.waiting < self._settings.max_queue_size and not self._overflow

    def _leave_queue(self) -> None:
        """Give a free place to the first in the overflow queue; `waiting` then stays as it is."""
        if self._overflow:
            self._overflow.popleft().turn.set()
        else:
            self.waiting -= 1

    def _refusal(self, message: str) -> QueueFullError:
        seconds = self.retry_after_s()
        return QueueFullError(f"{message} Try again in {seconds} s.", retry_after_s=seconds)
