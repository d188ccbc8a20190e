"""Admission: the queue, the door before it, and refusals that say when to come back."""

from __future__ import annotations

import asyncio
import random

import pytest

from hypergen.config import QueueSettings
from hypergen.engine.admission import Admission, Place
from hypergen.errors import QueueFullError


def _admission(size: int = 1, timeout_s: float = 60) -> Admission:
    return Admission(QueueSettings.model_validate({"max_queue_size": size, "queue_timeout_s": timeout_s}))


class Visitor:
    """A request in a task: it enters, says so, and leaves when told."""

    def __init__(self, admission: Admission, entered: list[int], number: int) -> None:
        self.place: Place | None = None
        self._leave = asyncio.Event()
        self._admission, self._entered, self._number = admission, entered, number
        self.task = asyncio.create_task(self._visit())

    async def _visit(self) -> None:
        async with self._admission.place(1.0) as self.place:
            self._entered.append(self._number)
            await self._leave.wait()

    async def leave(self) -> None:
        self._leave.set()
        await self.task


async def _settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def _counts(admission: Admission) -> tuple[int, int, int]:
    return admission.running, admission.waiting, admission.at_the_door


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
    admission = Admission(QueueSettings.model_validate({"max_pictures_mb": 1}))
    async with admission.place(1.0, picture_bytes=2_000_000):  # alone it always fits
        async with admission.place(1.0):  # and those without pictures are not concerned
            with pytest.raises(QueueFullError, match="pictures") as refusal:
                await admission.place(1.0, picture_bytes=1).__aenter__()
        assert 1 <= (refusal.value.retry_after_s or 0) <= 60
    async with admission.place(1.0, picture_bytes=500_000), admission.place(1.0, picture_bytes=500_000):
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
    await visitors[0].leave()  # the turn of number 1 has come, but it does not know yet
    visitors[1].task.cancel()
    await _settle()
    assert entered == [0, 2]
    assert _counts(admission) == (0, 1, 0)
    await visitors[2].leave()
    assert _counts(admission) == (0, 0, 0)


async def test_the_time_to_come_back_follows_the_work_ahead() -> None:
    admission = _admission(10)
    assert admission.retry_after_s() == 60  # nothing was measured yet
    async with admission.place(1.0) as place:
        place.started()
        await asyncio.sleep(0.05)
    assert admission.retry_after_s() == 1
    async with admission.place(1e6):
        assert admission.retry_after_s() == 60


async def test_a_waiting_request_learns_who_is_before_it_and_how_long_it_takes() -> None:
    admission = _admission(1)
    async with admission.place(2.0, "done") as place:
        place.started()
        await asyncio.sleep(0.1)
    entered: list[str] = []

    async def visit(name: str) -> None:
        async with admission.place(1.0, name) as place:
            if name == "running":
                place.started()
            entered.append(name)
            await asyncio.sleep(60)

    names = ("running", "first", "at the door")
    tasks = [asyncio.create_task(visit(name)) for name in names]
    await _settle()
    assert entered == ["running", "first"]
    assert admission.outlook("running") is admission.outlook("unknown") is None
    first, door = admission.outlook("first"), admission.outlook("at the door")
    assert first is not None
    assert door is not None
    assert (first.position, door.position) == (0, 1)
    assert first.expected_s == pytest.approx(0.1, rel=0.5)  # as much work as was done, and as quickly
    assert door.expected_s == pytest.approx(1.5 * (first.expected_s or 0), rel=0.2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert admission.outlook("at the door") is None


async def test_without_a_measurement_no_time_is_told() -> None:
    admission = _admission(1)
    async with admission.place(1.0, "a"):
        outlook = admission.outlook("a")
    assert outlook is not None
    assert (outlook.position, outlook.expected_s) == (0, None)


async def test_counts_never_drift() -> None:
    admission, chance = _admission(3), random.Random(0)

    async def visit() -> None:
        async with admission.place(chance.random()) as place:
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
        assert admission.at_the_door <= 12
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {type(None), QueueFullError, asyncio.CancelledError}
    assert _counts(admission) == (0, 0, 0)
    assert abs(admission._work) < 1e-9
