"""Which engine gets a request, and which devices engines run on; nothing is started."""

from __future__ import annotations

from typing import Any

import pytest

from hypergen import ipc
from hypergen.config import EngineSettings, QueueSettings, Settings
from hypergen.engine.worker_main import _threads
from hypergen.engine_client.accelerators import Accelerator, find_accelerators
from hypergen.engine_client.admission import Admission
from hypergen.engine_client.costs import MeasuredCosts, estimated_seconds
from hypergen.engine_client.dispatch import assign, take_held, take_waiting
from hypergen.engine_client.engine_process import Supervisor
from hypergen.engine_client.engine_requests import EngineRequests, PoolHandle
from hypergen.engine_client.pool import EnginePool
from hypergen.errors import ConfigurationError
from hypergen.events import EngineStatus, RequestState, State
from hypergen.served_model import ServedModel
from tests.support.sync_engine import make_request, make_settings


class _Pool:
    """Engines without processes: what they are sent stays in their outboxes."""

    def __init__(self, engines: int) -> None:
        self.admission = Admission(QueueSettings.model_validate({}))
        self.costs = MeasuredCosts()
        self.engines = [self._engine(number) for number in range(engines)]

    def _engine(self, number: int) -> EngineRequests:
        def ignore(*_: Any) -> None:
            pass

        supervisor = Supervisor(
            ipc.Start(()), Accelerator("cpu"), on_ready=ignore, on_message=ignore, on_lost=ignore
        )
        engine = EngineRequests(number, supervisor, self.costs)
        self.set(engine)
        return engine

    def set(self, engine: EngineRequests, *models: str, state: State = "ready", load_s: float = 10) -> None:
        loads = {"a": load_s, "b": load_s}
        engine.supervisor.status = EngineStatus(state=state, models=models or ("a",), load_s=loads)

    def handle(self, work: float, model: str = "a") -> PoolHandle:
        ticket = self.admission.enter(work)
        return PoolHandle(make_request(), model, ticket, None, on_cancel=lambda _: None)

    def assign(self, work: float, model: str = "a") -> int | None:
        """The number of the engine that gets a request with this much work."""
        handle = self.handle(work, model)
        assign(handle, self.engines)
        return next((engine.number for engine in self.engines if handle in engine.handles), None)


async def test_the_engine_with_the_least_work_gets_a_request() -> None:
    pool = _Pool(3)
    assert [pool.assign(work) for work in (5, 1, 1, 1, 1, 4)] == [0, 1, 2, 1, 2, 1]


async def test_only_the_work_that_is_left_counts() -> None:
    pool = _Pool(2)
    assert [pool.assign(10), pool.assign(4)] == [0, 1]
    (running,) = pool.engines[0].handles
    running.ticket.started(0)
    running.ticket.progress(0.9)
    assert pool.assign(1) == 0


async def test_an_engine_that_is_not_ready_gets_requests_only_if_none_is_and_a_failed_one_never() -> None:
    pool = _Pool(2)
    pool.set(pool.engines[0], state="recovering")
    assert [pool.assign(100), pool.assign(100)] == [1, 1]
    pool.set(pool.engines[1], state="failed")
    assert pool.assign(1) == 0
    pool.set(pool.engines[0], state="failed")
    assert pool.assign(1) is None


async def test_a_request_waits_for_an_engine_with_its_model_unless_a_load_takes_less() -> None:
    pool = _Pool(2)
    pool.set(pool.engines[0], "a")
    pool.set(pool.engines[1], "b")
    assert [pool.assign(3, "a") for _ in range(3)] == [0, 0, 0]
    assert [pool.assign(1, "b") for _ in range(2)] == [1, 1]
    # The first engine has 9 s of work; the second has 2 s, and would load the model for 10 s, once.
    assert [pool.assign(3.5, "a") for _ in range(3)] == [0, 1, 0]
    assert pool.engines[1].estimated_seconds() == 2 + 10 + 3.5


async def test_held_requests_move_to_the_engine_that_is_ready_first() -> None:
    pool = _Pool(3)
    for engine in pool.engines:
        pool.set(engine, state="loading")
    assert {pool.assign(1) for _ in range(6)} == {0, 1, 2}
    pool.set(pool.engines[1])
    take_held(pool.engines[1], pool.engines)
    assert [len(engine.handles) for engine in pool.engines] == [0, 6, 0]
    assert len(pool.engines[1].submitted) == 6


async def test_an_idle_engine_takes_waiting_requests_while_they_are_done_sooner() -> None:
    pool = _Pool(2)
    pool.set(pool.engines[1], state="recovering")
    handles = [pool.handle(1) for _ in range(6)]
    for handle in handles:
        assign(handle, pool.engines)
    handles[0].state = RequestState.RUNNING
    pool.set(pool.engines[1])
    take_waiting(pool.engines[1], pool.engines)
    assert pool.engines[1].handles == handles[1:4]
    assert pool.engines[0].handles == [handles[0], *handles[4:]]
    take_waiting(pool.engines[1], pool.engines)  # it is not idle
    assert len(pool.engines[1].handles) == 3


async def test_an_idle_engine_does_not_load_a_model_for_a_short_queue() -> None:
    pool = _Pool(2)
    pool.set(pool.engines[1], "b")
    for _ in range(3):
        pool.engines[0].add(pool.handle(2, "a"))
    take_waiting(pool.engines[1], pool.engines)
    assert not pool.engines[1].handles
    pool.set(pool.engines[1], "b", load_s=3)
    take_waiting(pool.engines[1], pool.engines)
    assert len(pool.engines[1].handles) == 1


async def test_requests_that_may_have_crashed_an_engine_stay_with_it() -> None:
    pool = _Pool(2)
    suspect = pool.handle(50)
    suspect.crashes = 1
    pool.engines[0].add(suspect)
    held = pool.handle(1)
    pool.engines[0].add(held)
    take_waiting(pool.engines[1], pool.engines)
    assert (pool.engines[0].handles, pool.engines[1].handles) == ([suspect], [held])


def test_costs_are_measured_for_each_engine_and_model() -> None:
    costs = MeasuredCosts()
    assert costs.seconds_for(0, "a", 3.0) == 3.0  # nothing is measured
    costs.record_forward(0, "a", 0.5)
    costs.record_work(0, "a", 0.25)
    assert costs.seconds_for(0, "a", 3.0) == pytest.approx(6)
    assert costs.seconds_for(1, "a", 3.0) == pytest.approx(6)  # as the other engine
    assert costs.seconds_for(1, "b", 3.0) == pytest.approx(6)  # as the other model
    for _ in range(500):  # this engine is faster
        costs.record_forward(1, "a", 0.1)
        costs.record_work(1, "a", 0.25)
    assert costs.seconds_for(1, "a", 3.0) == pytest.approx(1.2, rel=0.05)
    assert costs.seconds_for(0, "a", 3.0) == pytest.approx(6)


def test_a_missing_model_counts_once() -> None:
    assert estimated_seconds([("a", 1.0), ("a", 2.0), ("b", 4.0)], ["b"], {"a": 10.0, "b": 5.0}) == 17.0
    assert estimated_seconds([], ["a"], {"b": 5.0}) == 0.0


async def test_a_server_without_its_devices_says_so_in_its_status() -> None:
    pool = EnginePool(Settings.model_validate({"engine": {"devices": "cuda:99"}}))
    await pool.start([])
    try:
        status = pool.status()
        assert (status.state, status.engines) == ("failed", ())
        assert "devices cuda:99: no such device" in (status.reason or "")
    finally:
        await pool.stop()


def _devices(**engine: Any) -> list[Accelerator]:
    return find_accelerators(EngineSettings.model_validate(engine))


def test_every_visible_gpu_or_those_of_the_setting_get_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5e")
    first = Accelerator("cuda:0", {"CUDA_VISIBLE_DEVICES": "2"})
    second = Accelerator("cuda:1", {"CUDA_VISIBLE_DEVICES": "GPU-5e"})
    assert _devices(device="cuda") == _devices(device="cuda", devices="all") == [first, second]
    assert _devices(devices="cuda:1") == [second]
    assert _devices(devices=["cuda:1", "cuda:0"], device="cuda") == [second, first]
    assert _devices(devices="cpu, cpu") == [Accelerator("cpu")] * 2
    assert _devices(device="cpu") == [Accelerator()]
    with pytest.raises(ConfigurationError, match=r"devices cuda:2: no such device; .* cuda:0 to cuda:1"):
        _devices(devices="cuda:0,cuda:2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigurationError, match="this machine has no GPU"):
        _devices(devices="cuda:0")


def test_engines_on_the_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypergen.engine.worker_main.usable_cores", lambda: 8)
    models = (ServedModel(id="small", path=None, settings=make_settings()),)  # pyright: ignore[reportArgumentType]
    assert [_threads(ipc.Start(models, engines=engines), 6) for engines in (1, 2, 3, 9)] == [6, 4, 2, 1]
