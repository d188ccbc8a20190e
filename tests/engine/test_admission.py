"""Admission: the request queue, the overflow queue, and refusals with a retry time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from hypergen.config import QueueSettings
from hypergen.engine_client import admission as admissions
from hypergen.engine_client import key_limits
from hypergen.engine_client.admission import Admission, AdmissionTicket
from hypergen.errors import InvalidRequestError, QueueFullError, UnavailableError
from hypergen.request import ApiKey


def _admission(size: int = 1, timeout_s: float = 60) -> Admission:
    return Admission(QueueSettings.model_validate({"max_queue_size": size, "queue_timeout_s": timeout_s}))


@asynccontextmanager
async def admitted(
    admission: Admission, work: float, input_image_bytes: int = 0
) -> AsyncGenerator[AdmissionTicket, None]:
    """A ticket for the duration of the block; at its end all work is done, if the request started."""
    ticket = admission.enter(work, input_image_bytes)
    try:
        await admission.wait(ticket)
        yield ticket
        if ticket.running:
            ticket.progress(1.0)
    finally:
        ticket.leave()


class _Client:
    """A request in a task: it appends its number to `order` and runs until `leave`."""

    def __init__(self, admission: Admission, order: list[int], number: int) -> None:
        self.ticket: AdmissionTicket | None = None
        self._leave = asyncio.Event()
        self._admission, self._order, self._number = admission, order, number
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with admitted(self._admission, 1.0) as self.ticket:
            self._order.append(self._number)
            await self._leave.wait()

    async def leave(self) -> None:
        self._leave.set()
        await self.task


async def _settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def _counts(admission: Admission) -> tuple[int, int, int]:
    return admission.running, admission.waiting, admission.overflow


async def test_requests_beyond_the_queue_size_wait_in_the_overflow_queue_in_order() -> None:
    admission, order = _admission(2), []
    clients = [_Client(admission, order, number) for number in range(5)]
    await _settle()
    assert _counts(admission) == (0, 2, 3)
    ticket = clients[1].ticket
    assert ticket
    ticket.started()
    ticket.started()  # again, after an engine restart
    await _settle()
    assert _counts(admission) == (1, 2, 2)
    for client in clients:
        await client.leave()
    assert order == [0, 1, 2, 3, 4]
    assert _counts(admission) == (0, 0, 0)


async def test_a_wait_in_the_overflow_queue_times_out_with_a_retry_time() -> None:
    admission, order = _admission(1, timeout_s=0.05), []
    first, second = (_Client(admission, order, number) for number in range(2))
    with pytest.raises(QueueFullError) as refusal:
        await second.task
    assert 1 <= (refusal.value.retry_after_s or 0) <= 60
    await first.leave()
    assert _counts(admission) == (0, 0, 0)


async def test_input_images_beyond_their_memory_limit_are_refused_at_once() -> None:
    admission = Admission(QueueSettings.model_validate({"max_input_image_mb": 1}))
    async with admitted(admission, 1.0, input_image_bytes=2_000_000):  # a single request is always admitted
        async with admitted(admission, 1.0):  # requests without input images are not affected
            with pytest.raises(QueueFullError, match="input images") as refusal:
                admission.enter(1.0, input_image_bytes=1)
        assert 1 <= (refusal.value.retry_after_s or 0) <= 60
    async with (
        admitted(admission, 1.0, input_image_bytes=500_000),
        admitted(admission, 1.0, input_image_bytes=500_000),
    ):
        assert _counts(admission) == (0, 2, 0)
    assert _counts(admission) == (0, 0, 0)


async def test_without_a_timeout_the_overflow_queue_is_off() -> None:
    admission, order = _admission(1, timeout_s=0), []
    first, second = (_Client(admission, order, number) for number in range(2))
    with pytest.raises(QueueFullError):
        await second.task
    await first.leave()
    await _Client(admission, order, 2).leave()


async def test_the_overflow_queue_holds_four_times_the_queue_size() -> None:
    admission, order = _admission(2), []
    clients = [_Client(admission, order, number) for number in range(11)]
    with pytest.raises(QueueFullError):
        await clients.pop().task
    assert _counts(admission) == (0, 2, 8)
    for client in clients:
        await client.leave()
    assert _counts(admission) == (0, 0, 0)


async def test_a_cancelled_wait_leaves_the_overflow_queue() -> None:
    admission, order = _admission(1), []
    clients = [_Client(admission, order, number) for number in range(4)]
    await _settle()
    clients[1].task.cancel()
    await _settle()
    assert _counts(admission) == (0, 1, 2)
    for number in (0, 2, 3):
        await clients[number].leave()
    assert order == [0, 2, 3]


async def test_a_turn_of_a_cancelled_request_goes_to_the_next() -> None:
    admission, order = _admission(1), []
    clients = [_Client(admission, order, number) for number in range(3)]
    await _settle()
    ticket = clients[0].ticket
    assert ticket
    ticket.leave()  # number 1 has its turn, but its task has not run yet
    clients[1].task.cancel()
    await _settle()
    assert order == [0, 2]
    assert _counts(admission) == (0, 1, 0)
    for number in (0, 2):
        await clients[number].leave()
    assert _counts(admission) == (0, 0, 0)


async def test_the_retry_time_follows_the_unfinished_work() -> None:
    admission = _admission(10)
    async with admitted(admission, 1e6):
        assert admission.retry_after_s() == 5  # before the first measurement
    async with admitted(admission, 1.0) as ticket:
        ticket.started()
        await asyncio.sleep(0.05)
    assert admission.retry_after_s() == 1
    async with admitted(admission, 1e6):
        assert admission.retry_after_s() == 60


async def test_a_waiting_request_has_a_position_and_an_expected_time() -> None:
    admission = _admission(1)
    async with admitted(admission, 2.0) as ticket:
        ticket.started()
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
    assert next_one.expected_s == pytest.approx(0.1, rel=0.5)  # as much work as was measured
    assert after_it.expected_s == pytest.approx(1.5 * (next_one.expected_s or 0), rel=0.2)
    for ticket in (running, first, in_overflow):
        ticket.leave()
    assert admission.queue_position(in_overflow) is None


async def test_without_a_measurement_there_is_no_expected_time() -> None:
    admission = _admission(1)
    position = admission.queue_position(admission.enter(1.0))
    assert position is not None
    assert (position.position, position.expected_s) == (0, None)


async def test_counts_stay_consistent() -> None:
    admission, rng = _admission(3), random.Random(0)

    async def run_request() -> None:
        async with admitted(admission, rng.random()) as ticket:
            await asyncio.sleep(rng.choice([0, 0.001, 0.003]))
            if rng.random() < 0.7:
                ticket.started()
                await asyncio.sleep(rng.choice([0, 0.001, 0.003]))

    tasks: list[asyncio.Task[None]] = []
    for _ in range(600):
        tasks.append(asyncio.create_task(run_request()))
        if rng.random() < 0.4:
            await asyncio.sleep(0.001)
        if rng.random() < 0.3:
            rng.choice(tasks).cancel()
        assert admission.waiting <= 3
        assert admission.overflow <= 12
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {type(None), QueueFullError, asyncio.CancelledError}
    assert _counts(admission) == (0, 0, 0)
    assert admission.retry_after_s() <= 1
    assert not admission._tickets


async def test_close_refuses_requests_in_the_overflow_queue() -> None:
    admission, order = _admission(1), []
    clients = [_Client(admission, order, number) for number in range(4)]
    await _settle()
    assert _counts(admission) == (0, 1, 3)
    admission.close(lambda: UnavailableError("closed", code="draining"))
    await clients[0].leave()
    for client in clients[1:]:
        with pytest.raises(UnavailableError):
            await client.task
    with pytest.raises(UnavailableError):
        admission.enter(1.0)
    assert order == [0]
    assert _counts(admission) == (0, 0, 0)


async def test_close_refuses_a_request_whose_turn_has_just_come() -> None:
    admission, order = _admission(1), []
    first, second = (_Client(admission, order, number) for number in range(2))
    await _settle()
    assert first.ticket
    first.ticket.leave()  # the second has its turn, but its task has not run yet
    admission.close(lambda: UnavailableError("closed", code="draining"))
    with pytest.raises(UnavailableError):
        await second.task
    await first.leave()
    assert _counts(admission) == (0, 0, 0)


class _Clock:
    """A fake clock for the module under test."""

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
    """Run a request with 10 units of work that ends after `seconds` with this share of it done."""
    ticket = admission.enter(10.0)
    ticket.started()
    for step in range(1, steps + 1):
        clock.now += seconds / steps
        ticket.progress(share * step / steps)
    ticket.leave()


async def test_cancelled_requests_do_not_reduce_the_measured_throughput(clock: _Clock) -> None:
    """The throughput is one unit per second, although 30 requests end after a tenth of their work."""
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


async def test_the_retry_time_counts_only_the_work_that_is_left(clock: _Clock) -> None:
    admission = _admission(10)
    await _run(admission, clock, seconds=10, share=1.0)
    running = admission.enter(20.0)
    running.started()
    assert admission.retry_after_s() == 20
    clock.now += 15
    running.progress(0.75)
    assert admission.retry_after_s() == 5


async def test_several_engines_share_the_work_ahead_but_not_that_of_one_request(clock: _Clock) -> None:
    admission = _admission(10)
    admission.ready_engines = 2
    running = [admission.enter(10.0) for _ in range(2)]
    for engine, ticket in enumerate(running):
        ticket.started(engine)
    for second in range(10):
        clock.now += 1
        for ticket in running:
            ticket.progress((second + 1) / 10)
    for ticket in running:
        ticket.leave()
    assert admission.throughput.seconds_for(10.0) == pytest.approx(10)  # of one engine

    tickets = [admission.enter(10.0) for _ in range(4)]
    position = admission.queue_position(tickets[3])
    assert position
    assert (position.position, position.expected_s) == (3, pytest.approx(20))
    assert admission.retry_after_s() == 20
    position = admission.queue_position(tickets[0])
    assert position
    assert position.expected_s == pytest.approx(10)


async def test_the_time_of_a_stall_and_restart_is_not_counted(clock: _Clock) -> None:
    admission = _admission(10)
    await _run(admission, clock, seconds=10, share=1.0)
    ticket = admission.enter(10.0)
    ticket.started()
    clock.now += 300  # the engine stalls and is killed
    ticket.restart()
    clock.now += 120  # the model is loaded again
    ticket.started()
    for step in range(10):
        clock.now += 1
        ticket.progress((step + 1) / 10)
    ticket.leave()
    assert admission.throughput.seconds_for(10.0) == pytest.approx(10)


async def test_a_key_below_its_share_is_admitted_to_a_full_queue() -> None:
    admission, busy, other = _admission(4), ApiKey("busy"), ApiKey("other")
    for _ in range(20):
        admission.enter(1.0, api_key=busy)
    with pytest.raises(QueueFullError):
        admission.enter(1.0, api_key=busy)
    assert (admission.waiting, admission.overflow) == (4, 16)
    tickets = [admission.enter(1.0, api_key=other) for _ in range(10)]
    # Half of both limits: two do not wait in the overflow queue, eight do.
    assert [ticket.turn.is_set() for ticket in tickets] == [True] * 2 + [False] * 8
    with pytest.raises(QueueFullError):
        admission.enter(1.0, api_key=other)


async def test_free_slots_go_to_the_key_with_the_fewest() -> None:
    admission = _admission(2)
    busy = [admission.enter(1.0, api_key=ApiKey("busy")) for _ in range(6)]
    other = [admission.enter(1.0, api_key=ApiKey("other", "high")) for _ in range(8)]
    assert [ticket.turn.is_set() for ticket in other].count(True) == 2  # 16 of 20 shares of two slots
    for ticket in busy[:2]:
        ticket.started()
    assert [ticket.turn.is_set() for ticket in busy] == [True] * 3 + [False] * 3
    assert [ticket.turn.is_set() for ticket in other].count(True) == 2
    for ticket in other[:2]:
        ticket.started()
    assert [ticket.turn.is_set() for ticket in busy].count(True) == 3
    assert [ticket.turn.is_set() for ticket in other].count(True) == 4
    for ticket in [*busy, *other]:
        ticket.leave()
    assert _counts(admission) == (0, 0, 0)


async def test_a_key_has_a_number_of_requests_at_once() -> None:
    admission, key = _admission(8), ApiKey("small", max_requests=2)
    first, _ = admission.enter(1.0, api_key=key), admission.enter(1.0, api_key=key)
    with pytest.raises(QueueFullError, match="limit of unfinished requests is 2") as refusal:
        admission.enter(1.0, api_key=key)
    assert refusal.value.retry_after_s
    admission.enter(1.0)
    first.leave()
    admission.enter(1.0, api_key=key)


async def test_a_key_has_a_number_of_images_per_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(key_limits.time, "monotonic", lambda: now)
    admission, key = _admission(8), ApiKey("small", images_per_minute=5)
    with pytest.raises(InvalidRequestError, match="at most 5"):
        admission.enter(1.0, api_key=key, n=6)
    admission.enter(1.0, api_key=key, n=2)
    now += 20
    admission.enter(1.0, api_key=key, n=3)
    for n, seconds in ((1, 40), (2, 40), (3, 60)):
        with pytest.raises(QueueFullError, match="5 images per minute") as refusal:
            admission.enter(1.0, api_key=key, n=n)
        assert refusal.value.retry_after_s == seconds
    now += 40
    admission.enter(1.0, api_key=key, n=2)


async def test_the_position_counts_what_other_keys_get_meanwhile() -> None:
    admission = _admission(100)
    for _ in range(50):
        admission.enter(1.0, api_key=ApiKey("busy"))
    keys = (ApiKey("other"), ApiKey("other"), ApiKey("high", "high"))
    first, second, high = (admission.enter(1.0, api_key=key) for key in keys)
    positions = [admission.queue_position(ticket) for ticket in (first, second, high)]
    assert [position.position for position in positions if position] == [0, 3, 0]
