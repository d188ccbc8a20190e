"""The pool with real engine processes: scheduling, cancellation, crashes and restarts."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from hypergen.config import Settings
from hypergen.engine_client.accelerators import Accelerator
from hypergen.engine_client.engine_process import Supervisor
from hypergen.engine_client.pool import EnginePool
from hypergen.engine_protocol import RequestHandle, generate_all
from hypergen.errors import GenerationError, RequestError, UnavailableError
from hypergen.events import ImageFinished, Progress, Started, State
from hypergen.request import GenerationRequest, InputImage
from tests.support.sync_engine import make_request, make_settings, served_model

_TIMEOUT_S = 120  # for a busy machine; usually a tenth is enough


@asynccontextmanager
async def _pool(
    folder: Path, engines: int = 1, state: State = "ready", queue: int = 100, **settings: Any
) -> AsyncGenerator[EnginePool, None]:
    values = {"engine": make_settings(**settings), "queue": {"max_queue_size": queue}}
    pool = EnginePool(Settings.model_validate(values), accelerators=[Accelerator()] * engines)
    await pool.start([served_model(folder, **settings)])
    pids = pool.engine_pids()
    try:
        await _until(lambda: all(engine.state == state for engine in pool.status().engines))
        yield pool
    finally:
        await pool.stop()
    assert not any(psutil.pid_exists(pid) for pid in pids)


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(_TIMEOUT_S):
        while not condition():  # noqa: ASYNC110  it happens in another process
            await asyncio.sleep(0.02)


async def _wait_for_step(pool: EnginePool, request: Any, step: int) -> RequestHandle:
    """Submit a request and return its handle after this step, while it still runs."""
    handle = await pool.submit(request)
    async for event in handle:
        if isinstance(event, Progress) and event.step >= step:
            break
    return handle


def _long_request() -> GenerationRequest:
    """It does not finish within a test."""
    return make_request(num_inference_steps=900, width=256, height=256)


async def _remaining_images(events: RequestHandle) -> list[ImageFinished]:
    return [event async for event in events if isinstance(event, ImageFinished)]


def _kill_engines(pool: EnginePool) -> None:
    for pid in pool.engine_pids():
        os.kill(pid, signal.SIGKILL)


async def test_cancelled_requests_leave_the_queue_and_the_engine(sd_folder: Path) -> None:
    async with _pool(sd_folder, queue=1, max_batch_size=1) as pool:
        running = await _wait_for_step(pool, _long_request(), 3)
        waiting = asyncio.create_task(generate_all(pool, _long_request()))
        overflow = asyncio.create_task(generate_all(pool, _long_request()))
        await _until(lambda: pool.status().overflow == 1)
        assert pool.status().queue_size == 3

        overflow.cancel()
        await _until(lambda: pool.status().overflow == 0)
        waiting.cancel()
        running.cancel()
        await asyncio.gather(waiting, overflow, return_exceptions=True)
        assert pool.status().queue_size == 0

        # The engine is free at once and runs no step of a cancelled request.
        (image,) = await generate_all(pool, make_request())
        assert image.shared_forwards == 0
        await asyncio.sleep(1.5)
        steps = pool.status().engines[0].image_steps
        await asyncio.sleep(1.5)
        assert pool.status().engines[0].image_steps == steps


async def test_submit_does_not_wait_for_the_overflow_queue(sd_folder: Path) -> None:
    async with _pool(sd_folder, queue=1, max_batch_size=1) as pool:
        running = await _wait_for_step(pool, _long_request(), 1)
        waiting, in_overflow = await pool.submit(_long_request()), await pool.submit(make_request())
        assert [handle.state for handle in (running, waiting, in_overflow)] == [
            "running",
            "waiting",
            "waiting",
        ]
        position = in_overflow.queue_position()
        assert position
        assert (position.position, pool.status().overflow) == (1, 1)
        running.cancel()
        waiting.cancel()
        # It is admitted and generated although no client reads its events.
        await _until(lambda: in_overflow.state == "finished")
        assert in_overflow.queue_position() is None
        assert len(await _remaining_images(in_overflow)) == len(await _remaining_images(running)) + 1 == 1
        assert running.state == waiting.state == "cancelled"


async def test_signals_for_the_server_do_not_stop_an_engine(sd_folder: Path) -> None:
    async with _pool(sd_folder) as pool:
        events = await _wait_for_step(pool, make_request(num_inference_steps=30), 1)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(pool.engine_pids()[0], number)
        assert len(await _remaining_images(events)) == 1
        assert pool.status().engines[0].restarts == 0


async def test_requests_of_a_crashed_engine_are_generated_again_with_the_same_bytes(sd_folder: Path) -> None:
    async with _pool(sd_folder, aging=0) as pool:
        first = make_request(n=2, num_inference_steps=20, width=256, height=256, sampler="euler_a")
        others = [make_request(num_inference_steps=60, seed=seed) for seed in range(3)]
        reference = [await generate_all(pool, request) for request in (first, *others)]

        again = [
            make_request(n=2, num_inference_steps=20, width=256, height=256, sampler="euler_a"),
            *(make_request(num_inference_steps=60, seed=seed) for seed in range(3)),
        ]
        running = [await _wait_for_step(pool, request, 1) for request in again]
        _kill_engines(pool)
        await _until(lambda: pool.status().state == "recovering")
        with pytest.raises(UnavailableError):
            await generate_all(pool, make_request())
        async with asyncio.timeout(_TIMEOUT_S):
            images = await asyncio.gather(*(_remaining_images(events) for events in running))
        for actual, expected in zip(images, reference, strict=True):
            assert sorted(image.index for image in actual) == list(range(len(expected)))
            assert [i.data for i in sorted(actual, key=lambda i: i.index)] == [i.data for i in expected]
        assert pool.status().engines[0].restarts == 1
        assert pool.status().queue_size == 0


async def test_an_image_is_delivered_once_despite_a_crash(sd_folder: Path) -> None:
    async with _pool(sd_folder, max_batch_size=1, aging=0) as pool:
        events = await pool.submit(make_request(n=2, num_inference_steps=60))
        delivered: list[int] = []
        async for event in events:
            if isinstance(event, ImageFinished):
                delivered.append(event.index)
                if len(delivered) == 1:
                    _kill_engines(pool)
        assert sorted(delivered) == [0, 1]


async def test_a_request_that_crashes_engines_is_found_and_the_others_finish(sd_folder: Path) -> None:
    async with _pool(sd_folder) as pool:
        poison = await _wait_for_step(pool, _long_request(), 1)
        other = await _wait_for_step(pool, make_request(num_inference_steps=300), 1)
        other_images = asyncio.create_task(_remaining_images(other))
        _kill_engines(pool)
        async with asyncio.timeout(_TIMEOUT_S):
            while not isinstance(await anext(poison), Started):  # for the second time
                pass
        _kill_engines(pool)
        with pytest.raises(GenerationError) as error:
            await _remaining_images(poison)
        assert error.value.code == "poison"
        async with asyncio.timeout(_TIMEOUT_S):
            assert len(await other_images) == 1
            assert len(await generate_all(pool, make_request())) == 1


async def test_requests_fail_if_an_engine_cannot_be_restarted(sd_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd_folder, tmp_path / "model")
    async with _pool(folder) as pool:
        running = await _wait_for_step(pool, _long_request(), 1)
        shutil.rmtree(folder)
        _kill_engines(pool)
        async with asyncio.timeout(_TIMEOUT_S):
            with pytest.raises(UnavailableError):
                await _remaining_images(running)
        await _until(lambda: pool.status().state == "failed")
        assert pool.status().reason
        with pytest.raises(UnavailableError):
            await generate_all(pool, make_request())


async def test_a_client_that_reads_no_events_blocks_neither_queue_nor_engine(sd_folder: Path) -> None:
    async with _pool(sd_folder, queue=1) as pool:
        handle = await pool.submit(make_request(num_inference_steps=4))
        assert await anext(handle)
        await _until(lambda: pool.status().queue_size == 0)  # the engine has finished

        # A later crash does not affect it.
        _kill_engines(pool)
        await _until(lambda: pool.status().state == "recovering")
        await _until(lambda: pool.status().state == "ready")
        async with asyncio.timeout(_TIMEOUT_S):
            assert len(await generate_all(pool, make_request())) == 1
        assert len(await _remaining_images(handle)) == 1
        assert pool.status().engines[0].restarts == 1


async def test_requests_without_denoising_leave_the_queue_if_no_client_reads_their_events(
    sd_folder: Path,
) -> None:
    """With strength 0 nothing is denoised, so the request never starts."""
    image = InputImage(64, 64, bytes(64 * 64 * 3))
    async with _pool(sd_folder, queue=1) as pool:
        handles = [await pool.submit(make_request(image=image, strength=0.0, n=2)) for _ in range(3)]
        for handle in handles:
            async with asyncio.timeout(_TIMEOUT_S):
                assert isinstance(await anext(handle), ImageFinished)
        await _until(lambda: pool.status().queue_size == 0)
        assert len(await generate_all(pool, make_request())) == 1
        for handle in handles:
            assert len(await _remaining_images(handle)) == 1


async def test_requests_of_a_recovering_engine_move_to_one_that_is_ready_first(
    sd_folder: Path,
) -> None:
    async with _pool(sd_folder, engines=2, max_batch_size=1) as pool:
        requests = [make_request(num_inference_steps=60, seed=seed) for seed in range(8)]
        tasks = [asyncio.create_task(generate_all(pool, request)) for request in requests]
        await _until(lambda: pool.status().running >= 2)
        assert pool.status().waiting >= 2
        first, second = pool.engine_pids()
        os.kill(second, signal.SIGKILL)
        await _until(lambda: second not in pool.engine_pids())
        slow = pool.engine_pids()[1]
        os.kill(slow, signal.SIGSTOP)  # its restart is delayed
        try:
            os.kill(first, signal.SIGKILL)
            await _until(lambda: first not in pool.engine_pids())
            # Started requests are retried alone by their own engine; the first one runs all waiting ones.
            await _until(lambda: pool.status().waiting == 0)
            assert [engine.state for engine in pool.status().engines] == ["ready", "recovering"]
        finally:
            os.kill(slow, signal.SIGCONT)
        async with asyncio.timeout(_TIMEOUT_S):
            assert [len(images) for images in await asyncio.gather(*tasks)] == [1] * 8


async def test_a_drain_also_ends_requests_in_the_overflow_queue(sd_folder: Path) -> None:
    async with _pool(sd_folder, engines=2, queue=1, max_batch_size=1) as pool:
        tasks = [asyncio.create_task(generate_all(pool, _long_request())) for _ in range(5)]
        await _until(lambda: pool.status().queue_size == 5)
        await _until(lambda: pool.status().running == 2)
        pool.drain(0.2)
        async with asyncio.timeout(_TIMEOUT_S):
            errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert {getattr(error, "code", None) for error in errors} == {"draining"}
        assert pool.status().queue_size == 0


async def test_a_model_that_cannot_be_loaded_at_the_start_fails_the_pool(
    sd_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sd_folder, tmp_path / "model")
    shutil.rmtree(folder / "unet")
    async with _pool(folder, state="failed") as pool:
        assert "model" in (pool.status().reason or "")
        assert pool.model_info() is None
        with pytest.raises(UnavailableError):
            await generate_all(pool, make_request())


async def test_stopping_while_the_model_loads_leaves_no_process(sd_folder: Path) -> None:
    async with _pool(sd_folder, state="loading") as pool:
        with pytest.raises(UnavailableError):
            await generate_all(pool, make_request())


async def test_a_stalled_engine_is_restarted(sd_folder: Path) -> None:
    async with _pool(sd_folder, engine_stall_timeout_s=10) as pool:
        events = await _wait_for_step(pool, make_request(num_inference_steps=100), 1)
        os.kill(pool.engine_pids()[0], signal.SIGSTOP)
        async with asyncio.timeout(_TIMEOUT_S):
            assert len(await _remaining_images(events)) == 1
        assert pool.status().engines[0].restarts == 1


async def test_two_engines_share_the_work_and_generate_the_same_bytes(sd_folder: Path) -> None:
    async with _pool(sd_folder, engines=2, max_batch_size=1) as pool:
        requests = [make_request(num_inference_steps=10, seed=seed // 2) for seed in range(8)]
        images = await asyncio.gather(*(generate_all(pool, request) for request in requests))
        for one, other in zip(images[::2], images[1::2], strict=True):
            assert one[0].data == other[0].data
        await asyncio.sleep(1.5)
        assert all(engine.image_steps >= 20 for engine in pool.status().engines)

        # After a crash of one, the other runs the requests.
        os.kill(pool.engine_pids()[0], signal.SIGKILL)
        await _until(lambda: "recovering" in [engine.state for engine in pool.status().engines])
        async with asyncio.timeout(_TIMEOUT_S):
            assert (await generate_all(pool, make_request(num_inference_steps=10, seed=0)))[0].data == images[
                0
            ][0].data


async def test_stopping_the_pool_ends_running_requests(sd_folder: Path) -> None:
    async with _pool(sd_folder) as pool:
        events = await _wait_for_step(pool, _long_request(), 1)
        images = asyncio.create_task(_remaining_images(events))
        await pool.stop()
        with pytest.raises(RequestError) as error:
            await images
        assert error.value.code == "draining"


_PARENT = """
import asyncio, sys
from pathlib import Path
from hypergen.load_settings import load_settings
from hypergen.engine_client.accelerators import Accelerator
from hypergen.engine_client.pool import EnginePool
from hypergen.served_model import ServedModel

async def main():
    settings = load_settings(flags={"device": "cpu"})
    pool = EnginePool(settings, accelerators=[Accelerator()])
    await pool.start([ServedModel(id="small", path=Path(sys.argv[1]), settings=settings.engine)])
    print(*pool.engine_pids(), flush=True)
    if sys.argv[2] == "loaded":
        while pool.status().state != "ready":
            await asyncio.sleep(0.05)
        print("ready", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("moment", ["loading", "loaded"])
def test_an_engine_exits_when_its_parent_is_killed(sd_folder: Path, moment: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(sd_folder), moment], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    with parent.stdout:
        engine = psutil.Process(int(parent.stdout.readline()))
        if moment == "loaded":
            assert parent.stdout.readline() == "ready\n"
        else:
            time.sleep(2)  # during its imports
        parent.kill()
        parent.wait()
        # Not `Process.wait`: the engine is no child of ours, so it may stay a zombie for a while.
        until = time.monotonic() + (2 if moment == "loaded" else 20)
        while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until
            time.sleep(0.05)


async def test_an_engine_that_cannot_load_does_not_fail_the_others_and_is_tried_again(
    sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Supervisor, "_FIRST_RETRY_S", 0.1)
    environment = {"PYTHONHOME": "/nowhere"}
    settings = Settings.model_validate({"engine": make_settings()})
    pool = EnginePool(settings, accelerators=[Accelerator(), Accelerator(environment=environment)])
    await pool.start([served_model(sd_folder)])
    try:
        states: set[State] = set()

        def is_ready() -> bool:
            states.add(pool.status().state)
            return pool.status().state == "ready"

        await _until(is_ready)
        assert states == {"loading", "ready"}
        await _until(lambda: "failed" in {engine.state for engine in pool.status().engines})
        assert len(await generate_all(pool, make_request())) == 1
        environment.clear()  # the fault is over
        await _until(lambda: {engine.state for engine in pool.status().engines} == {"ready"})
    finally:
        await pool.stop()
