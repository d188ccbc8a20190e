"""Admission: a place in the queue, a wait at the door, or a refusal that says when to come back."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from hypergen.config import QueueSettings
from hypergen.errors import QueueFullError
from hypergen.generation import Outlook


@dataclass(eq=False)
class Place:
    """One accepted request. It waits until `started` is called, then it runs until it is left."""

    admission: Admission
    work: float
    name: str = ""
    running: bool = False

    def started(self) -> None:
        """The request has taken its first step: its place in the queue is free."""
        if not self.running:
            self.running = True
            self.admission.place_started()


class WorkRate:
    """How much work is done per busy second, the distant past fading.

    Work is counted in `GenerationRequest.work`; busy is when anything runs. Times are monotonic seconds.
    """

    _FADING = 0.9

    def __init__(self) -> None:
        self._work = 0.0
        self._busy_s = 0.0
        self._busy_since: float | None = None

    def busy(self, is_busy: bool) -> None:
        now = time.monotonic()
        if self._busy_since is not None:
            self._busy_s += now - self._busy_since
        self._busy_since = now if is_busy else None

    def done(self, work: float) -> None:
        self._work = self._work * self._FADING + work
        self._busy_s *= self._FADING

    def seconds_for(self, work: float) -> float:
        """How long this much work takes; infinite as long as nothing was measured."""
        now = time.monotonic()
        busy_s = self._busy_s + (now - self._busy_since if self._busy_since is not None else 0)
        return work * busy_s / self._work if self._work else math.inf


class Admission:
    """At most `max_queue_size` requests wait for the engine; more wait at the door, first come first served,
    for at most `queue_timeout_s` and at most four times as many; the rest is refused. So are requests whose
    pictures do not fit into memory beside those of others: they would hold them at the door too. Lives on the
    event loop.
    """

    _DOOR_FACTOR = 4
    _RETRY_AFTER_S = (1, 60)  # clients give up on longer ones (contract, section 6)

    def __init__(self, settings: QueueSettings) -> None:
        self._settings = settings
        self._door: deque[asyncio.Future[None]] = deque()
        self._rate = WorkRate()
        self._work = 0.0
        self._picture_bytes = 0
        self._places: list[Place] = []  # as they came
        self.waiting = 0
        self.running = 0

    @property
    def at_the_door(self) -> int:
        return len(self._door)

    @asynccontextmanager
    async def place(self, work: float, name: str = "", picture_bytes: int = 0) -> AsyncGenerator[Place, None]:
        """A place for one request, held until the block is left; `outlook` finds it by its name.

        Raises:
            QueueFullError: the door or the memory for pictures is full, or the wait at the door ended;
                `retry_after_s` says when to come back.
        """
        self._refuse_if_full(picture_bytes)
        self._work += work
        self._picture_bytes += picture_bytes
        place = Place(self, work, name)
        self._places.append(place)
        try:
            await self._enter()
            try:
                yield place
                self._rate.done(work)
            finally:
                if place.running:
                    self.running -= 1
                    self._rate.busy(self.running > 0)
                else:
                    self._leave_queue()
        finally:
            self._places.remove(place)
            self._work -= work
            self._picture_bytes -= picture_bytes

    def outlook(self, name: str) -> Outlook | None:
        """How things stand for the request of this name, if it waits."""
        index = next((i for i, place in enumerate(self._places) if place.name == name), None)
        if index is None or self._places[index].running:
            return None
        seconds = self._rate.seconds_for(sum(place.work for place in self._places[: index + 1]))
        position = sum(not place.running for place in self._places[:index])
        return Outlook(position, None if math.isinf(seconds) else seconds)

    def place_started(self) -> None:
        self.running += 1
        self._rate.busy(True)
        self._leave_queue()

    def retry_after_s(self) -> int:
        """Whole seconds until the work ahead is done at the measured rate, within what clients accept."""
        least, most = self._RETRY_AFTER_S
        seconds = self._rate.seconds_for(self._work)
        return most if math.isinf(seconds) else min(max(math.ceil(seconds), least), most)

    def _refuse_if_full(self, picture_bytes: int) -> None:
        together = self._picture_bytes + picture_bytes
        # One request alone always fits.
        if self._picture_bytes and picture_bytes and together > self._settings.max_pictures_mb * 1e6:
            raise self._refusal("The pictures of unfinished requests fill the memory for them.")
        door = self._DOOR_FACTOR * self._settings.max_queue_size if self._settings.queue_timeout_s else 0
        if not self._has_room() and len(self._door) >= door:
            raise self._refusal("The queue is full.")

    def _has_room(self) -> bool:
        return self.waiting < self._settings.max_queue_size and not self._door

    async def _enter(self) -> None:
        if self._has_room():
            self.waiting += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._door.append(turn)
        try:
            # Shielded, so that a turn which comes in the very moment of the time-out is seen below, not lost.
            async with asyncio.timeout(self._settings.queue_timeout_s):
                await asyncio.shield(turn)
        except BaseException as error:
            if turn.done():  # the place was given, and nobody is left to take it
                self._leave_queue()
            else:
                self._door.remove(turn)
            if isinstance(error, TimeoutError):
                raise self._refusal("The queue stayed full.") from None
            raise

    def _leave_queue(self) -> None:
        """Give a free place to the first at the door; `waiting` then stays as it is."""
        if self._door:
            self._door.popleft().set_result(None)
        else:
            self.waiting -= 1

    def _refusal(self, message: str) -> QueueFullError:
        seconds = self.retry_after_s()
        return QueueFullError(f"{message} Try again in {seconds} s.", retry_after_s=seconds)
