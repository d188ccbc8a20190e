"""Admission: the queue, the door before it, and refusals that say when to come back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from hypergen.config import QueueSettings
from hypergen.engine_client import admission as admissions
from hypergen.engine_client.admission import Admission, AdmissionTicket
from hypergen.errors import QueueFullError, UnavailableError


def _admission(size: int = 1, timeout_s: float = 60) -> Admission:
    return Admission(QueueSettings.model_validate({"max_queue_size": size, "queue_timeout_s": timeout_s}))


@asynccontextmanager
async def place_in(
    admission: Admission, work: float, input_image_bytes: int = 0
) -> AsyncGenerator[AdmissionTicket, None]:
    """A place until the block is left; all of its work is done then, if it started."""
    place = admission.enter(work, input_image_bytes)
    try:
        await admission.wait(place)
        yield place
        if place.running:
            place.progress(1.0)
    finally:
        place.leave()


class Visitor:
    """A request in a task: it enters, says so, and leaves when told."""

    def __init__(self, admission: Admission, entered: list[int], number: int) -> None:
        self.place: AdmissionTicket | None = None
        self._leave = asyncio.Event()
        self._admission, self._entered, self._number = admission, entered, number
        self.task = asyncio.create_task(self._visit())

    async def _visit(self) -> None:
        async with place_in(self._admission, 1.0) as self.place:
            self._entered.append(self._number)
            await self._leave.wait()

    async def leave(self) -> None:
        self._leave.set()
        await self.task


async def _settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def _counts(admission: Admission) -> tuple[int, int, int]:
    return admission.running, admission.waiting, admission.overflow


async def test_more_than_fit_wait_at_the_door_and_enter_in_order() -> None:
    admission, entered = _admission(2), []
    visitors = [Visitor(admission, entered, number) for number in range(5)]
    await _settle()
    assert _counts(admission) == (0, 2, 3)
    place = visitors[1].place
    assert place
    place.started()
    place.started()  # an engine that was started again says so again
    await _settle()
    assert _counts(admission) == (1, 2, 2)
    for visitor in visitors:
        await visitor.leave()
    assert entered == [0, 1, 2, 3, 4]
    assert _counts(admission) == (0, 0, 0)


async def test_a_wait_at_the_door_ends_with_a_refusal_that_says_when_to_come_back() -> None:
    admission, entered = _admission(1, timeout_s=0.05), []
    first, second = (Visitor(admission, entered, number) for number in range(2))
    with pytest.raises(QueueFullError) as refusal:
        await second.task
    assert 1 <= (refusal.value.retry_after_s or 0) <= 60
    await first.leave()
    assert _counts(admission) == (0, 0, 0)


async def test_pictures_beyond_the_memory_for_them_are_refused_at_once() -> None:
    admission = Admission(QueueSettings.model_validate({"max_input_image_mb": 1}))
    async with place_in(admission, 1.0, input_image_bytes=2_000_000):  # alone it always fits
        async with place_in(admission, 1.0):  # and those without pictures are not concerned
            with pytest.raises(QueueFullError, match="input images") as refusal:
                admission.enter(1.0, input_image_bytes=1)
        assert 1 <= (refusal.value.retry_after_s or 0) <= 60
    async with (
        place_in(admission, 1.0, input_image_bytes=500_000),
        place_in(admission, 1.0, input_image_bytes=500_000),
    ):
        assert _counts(admission) == (0, 2, 0)
    assert _counts(admission) == (0, 0, 0)


async def test_without_a_timeout_nobody_waits_at_the_door() -> None:
    admission, entered = _admission(1, timeout_s=0), []
    first, second = (Visitor(admission, entered, number) for number in range(2))
    with pytest.raises(QueueFullError):
        await second.task
    await first.leave()
    await Visitor(admission, entered, 2).leave()


async def test_the_door_holds_four_times_the_queue() -> None:
    admission, entered = _admission(2), []
    visitors = [Visitor(admission, entered, number) for number in range(11)]
    with pytest.raises(QueueFullError):
        await visitors.pop().task
    assert _counts(admission) == (0, 2, 8)
    for visitor in visitors:
        await visitor.leave()
    assert _counts(admission) == (0, 0, 0)


async def test_whoever_gives_up_at_the_door_leaves_no_gap() -> None:
    admission, entered = _admission(1), []
    visitors = [Visitor(admission, entered, number) for number in range(4)]
    await _settle()
    visitors[1].task.cancel()
    await _settle()
    assert _counts(admission) == (0, 1, 2)
    for number in (0, 2, 3):
        await visitors[number].leave()
    assert entered == [0, 2, 3]


async def test_a_turn_given_to_one_who_gives_up_in_that_moment_goes_to_the_next() -> None:
    admission, entered = _admission(1), []
    visitors = [Visitor(admission, entered, number) for number in range(3)]
    await _settle()
    place = visitors[0].place
    assert place
    place.leave()  # the turn of number 1 has come, but it does not know yet
    visitors[1].task.cancel()
    await _settle()
    assert entered == [0, 2]
    assert _counts(admission) == (0, 1, 0)
    for number in (0, 2):
        await visitors[number].leave()
    assert _counts(admission) == (0, 0, 0)


async def test_the_time_to_come_back_follows_the_work_ahead() -> None:
    admission = _admission(10)
    async with place_in(admission, 1e6):
        assert admission.retry_after_s() == 5  # nothing was measured yet
    async with place_in(admission, 1.0) as place:
        place.started()
        await asyncio.sleep(0.05)
    assert admission.retry_after_s() == 1
    async with place_in(admission, 1e6):
        assert admission.retry_after_s() == 60


async def test_a_waiting_request_learns_who_is_before_it_and_how_long_it_takes() -> None:
    admission = _admission(1)
    async with place_in(admission, 2.0) as place:
        place.started()
        await asyncio.sleep(0.1)
    running = admission.enter(1.0)
    running.started()
    first, in_overflow = admission.enter(1.0), admission.enter(1.0)
    assert _counts(admission) == (1, 1, 1)
    assert admission.queue_position(running) is None
    next_one, after_it = admission.queue_position(first), admission.queue_position(in_overflow)
    assert next_one is not None
    assert after_it is not None
    assert (next_one.position, after_it.position) == (0, 1)
    assert next_one.expected_s == pytest.approx(0.1, rel=0.5)  # as much work as was done, and as quickly
    assert after_it.expected_s == pytest.approx(1.5 * (next_one.expected_s or 0), rel=0.2)
    for ticket in (running, first, in_overflow):
        ticket.leave()
    assert admission.queue_position(in_overflow) is None


async def test_without_a_measurement_no_time_is_told() -> None:
    admission = _admission(1)
    position = admission.queue_position(admission.enter(1.0))
    assert position is not None
    assert (position.position, position.expected_s) == (0, None)


async def test_counts_never_drift() -> None:
    admission, chance = _admission(3), random.Random(0)

    async def visit() -> None:
        async with place_in(admission, chance.random()) as place:
            await asyncio.sleep(chance.choice([0, 0.001, 0.003]))
            if chance.random() < 0.7:
                place.started()
                await asyncio.sleep(chance.choice([0, 0.001, 0.003]))

    tasks: list[asyncio.Task[None]] = []
    for _ in range(600):
        tasks.append(asyncio.create_task(visit()))
        if chance.random() < 0.4:
            await asyncio.sleep(0.001)
        if chance.random() < 0.3:
            chance.choice(tasks).cancel()
        assert admission.waiting <= 3
        assert admission.overflow <= 12
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {type(None), QueueFullError, asyncio.CancelledError}
    assert _counts(admission) == (0, 0, 0)
    assert admission.retry_after_s() <= 1
    assert not admission._tickets


async def test_what_waits_in_the_overflow_queue_is_refused_when_admission_closes() -> None:
    admission, entered = _admission(1), []
    visitors = [Visitor(admission, entered, number) for number in range(4)]
    await _settle()
    assert _counts(admission) == (0, 1, 3)
    admission.close(lambda: UnavailableError("closed", code="draining"))
    await visitors[0].leave()
    for visitor in visitors[1:]:
        with pytest.raises(UnavailableError):
            await visitor.task
    with pytest.raises(UnavailableError):
        admission.enter(1.0)
    assert entered == [0]
    assert _counts(admission) == (0, 0, 0)


async def test_a_turn_that_comes_in_the_moment_of_the_close_is_refused() -> None:
    admission, entered = _admission(1), []
    first, second = (Visitor(admission, entered, number) for number in range(2))
    await _settle()
    assert first.place
    first.place.leave()  # the turn of the second has come, but it does not know yet
    admission.close(lambda: UnavailableError("closed", code="draining"))
    with pytest.raises(UnavailableError):
        await second.task
    await first.leave()
    assert _counts(admission) == (0, 0, 0)


class _Clock:
    """Replaces the clock of the module under test, not its code: minutes pass at once."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(admissions, "time", clock)
    return clock


async def _run(admission: Admission, clock: _Clock, seconds: float, share: float, steps: int = 10) -> None:
    """A request for 10 units of work that leaves after so many seconds with this share of it done."""
    place = admission.enter(10.0)
    place.started()
    for step in range(1, steps + 1):
        clock.now += seconds / steps
        place.progress(share * step / steps)
    place.leave()


async def test_requests_that_left_do_not_slow_the_measured_rate(clock: _Clock) -> None:
    """One unit of work a second, whoever stays to the end: 30 requests leave after a minute with theirs
    undone."""
    admission = _admission(10)
    await _run(admission, clock, seconds=10, share=1.0)
    assert admission.throughput.seconds_for(10.0) == pytest.approx(10)
    for _ in range(30):
        slow = admission.enter(600.0)
        slow.started()
        for second in range(60):
            clock.now += 1
            slow.progress((second + 1) / 600)
        slow.leave()
    assert admission.throughput.seconds_for(10.0) == pytest.approx(10)


async def test_the_work_ahead_is_what_is_left_of_it(clock: _Clock) -> None:
    admission = _admission(10)
    await _run(admission, clock, seconds=10, share=1.0)
    running = admission.enter(20.0)
    running.started()
    assert admission.retry_after_s() == 20
    clock.now += 15
    running.progress(0.75)
    assert admission.retry_after_s() == 5


async def test_the_time_of_a_stalled_engine_and_its_reload_is_not_counted(clock: _Clock) -> None:
    admission = _admission(10)
    await _run(admission, clock, seconds=10, share=1.0)
    place = admission.enter(10.0)
    place.started()
    clock.now += 300  # it stalls, and is killed
    place.restart()
    clock.now += 120  # the model is loaded again
    place.started()
    for step in range(10):
        clock.now += 1
        place.progress((step + 1) / 10)
    place.leave()
    assert admission.throughput.seconds_for(10.0) == pytest.approx(10)
