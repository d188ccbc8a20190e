"""The pool with real engine processes: scheduling, cancellation, crashes and restarts."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hypergen.config import Settings
from hypergen.engine_client.accelerators import Accelerator
from hypergen.engine_client.engine_process import Supervisor
from hypergen.engine_client.pool import EnginePool
from hypergen.engine_protocol import generate_all
from hypergen.errors import GenerationError, RequestError, UnavailableError
from hypergen.events import Started, State
from tests.support.engine_pools import (
    TIMEOUT_S,
    kill_engines,
    long_request,
    remaining_images,
    start_pool,
    until,
    wait_for_step,
)
from tests.support.sync_engine import make_request, make_settings, served_model


async def test_requests_of_a_crashed_engine_are_generated_again_with_the_same_bytes(sd_folder: Path) -> None:
    async with start_pool(sd_folder, aging=0) as pool:
        first = make_request(n=2, num_inference_steps=20, width=256, height=256, sampler="euler_a")
        others = [make_request(num_inference_steps=60, seed=seed) for seed in range(3)]
        reference = [await generate_all(pool, request) for request in (first, *others)]

        again = [
            make_request(n=2, num_inference_steps=20, width=256, height=256, sampler="euler_a"),
            *(make_request(num_inference_steps=60, seed=seed) for seed in range(3)),
        ]
        running = [await wait_for_step(pool, request, 1) for request in again]
        kill_engines(pool)
        await until(lambda: pool.status().state == "recovering")
        with pytest.raises(UnavailableError):
            await generate_all(pool, make_request())
        async with asyncio.timeout(TIMEOUT_S):
            images = await asyncio.gather(*(remaining_images(events) for events in running))
        for actual, expected in zip(images, reference, strict=True):
            assert sorted(image.index for image in actual) == list(range(len(expected)))
            assert [i.data for i in sorted(actual, key=lambda i: i.index)] == [i.data for i in expected]
        assert pool.status().engines[0].restarts == 1
        assert pool.status().queue_size == 0


async def test_a_request_that_crashes_engines_is_found_and_the_others_finish(sd_folder: Path) -> None:
    async with start_pool(sd_folder) as pool:
        poison = await wait_for_step(pool, long_request(), 1)
        other = await wait_for_step(pool, make_request(num_inference_steps=300), 1)
        other_images = asyncio.create_task(remaining_images(other))
        kill_engines(pool)
        async with asyncio.timeout(TIMEOUT_S):
            while not isinstance(await anext(poison), Started):  # for the second time
                pass
        kill_engines(pool)
        with pytest.raises(GenerationError) as error:
            await remaining_images(poison)
        assert error.value.code == "poison"
        async with asyncio.timeout(TIMEOUT_S):
            assert len(await other_images) == 1
            assert len(await generate_all(pool, make_request())) == 1


async def test_requests_fail_if_an_engine_cannot_be_restarted(sd_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd_folder, tmp_path / "model")
    async with start_pool(folder) as pool:
        running = await wait_for_step(pool, long_request(), 1)
        shutil.rmtree(folder)
        kill_engines(pool)
        async with asyncio.timeout(TIMEOUT_S):
            with pytest.raises(UnavailableError):
                await remaining_images(running)
        await until(lambda: pool.status().state == "failed")
        assert pool.status().reason
        with pytest.raises(UnavailableError):
            await generate_all(pool, make_request())


async def test_requests_of_a_recovering_engine_move_to_one_that_is_ready_first(
    sd_folder: Path,
) -> None:
    async with start_pool(sd_folder, engines=2, max_batch_size=1) as pool:
        requests = [make_request(num_inference_steps=60, seed=seed) for seed in range(8)]
        tasks = [asyncio.create_task(generate_all(pool, request)) for request in requests]
        await until(lambda: pool.status().running >= 2)
        assert pool.status().waiting >= 2
        first, second = pool.engine_pids()
        os.kill(second, signal.SIGKILL)
        await until(lambda: second not in pool.engine_pids())
        slow = pool.engine_pids()[1]
        os.kill(slow, signal.SIGSTOP)  # its restart is delayed
        try:
            os.kill(first, signal.SIGKILL)
            await until(lambda: first not in pool.engine_pids())
            # Started requests are retried alone by their own engine; the first one runs all waiting ones.
            await until(lambda: pool.status().waiting == 0)
            assert [engine.state for engine in pool.status().engines] == ["ready", "recovering"]
        finally:
            os.kill(slow, signal.SIGCONT)
        async with asyncio.timeout(TIMEOUT_S):
            assert [len(images) for images in await asyncio.gather(*tasks)] == [1] * 8


async def test_a_drain_also_ends_requests_in_the_overflow_queue(sd_folder: Path) -> None:
    async with start_pool(sd_folder, engines=2, queue=1, max_batch_size=1) as pool:
        tasks = [asyncio.create_task(generate_all(pool, long_request())) for _ in range(5)]
        await until(lambda: pool.status().queue_size == 5)
        await until(lambda: pool.status().running == 2)
        pool.drain(0.2)
        async with asyncio.timeout(TIMEOUT_S):
            errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert {getattr(error, "code", None) for error in errors} == {"draining"}
        assert pool.status().queue_size == 0


async def test_a_model_that_cannot_be_loaded_at_the_start_fails_the_pool(
    sd_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sd_folder, tmp_path / "model")
    shutil.rmtree(folder / "unet")
    async with start_pool(folder, state="failed") as pool:
        assert "model" in (pool.status().reason or "")
        assert pool.model_info() is None
        with pytest.raises(UnavailableError):
            await generate_all(pool, make_request())


async def test_stopping_while_the_model_loads_leaves_no_process(sd_folder: Path) -> None:
    async with start_pool(sd_folder, state="loading") as pool:
        with pytest.raises(UnavailableError):
            await generate_all(pool, make_request())


async def test_a_stalled_engine_is_restarted(sd_folder: Path) -> None:
    async with start_pool(sd_folder, engine_stall_timeout_s=10) as pool:
        events = await wait_for_step(pool, make_request(num_inference_steps=100), 1)
        os.kill(pool.engine_pids()[0], signal.SIGSTOP)
        async with asyncio.timeout(TIMEOUT_S):
            assert len(await remaining_images(events)) == 1
        assert pool.status().engines[0].restarts == 1


async def test_two_engines_share_the_work_and_generate_the_same_bytes(sd_folder: Path) -> None:
    async with start_pool(sd_folder, engines=2, max_batch_size=1) as pool:
        requests = [make_request(num_inference_steps=10, seed=seed // 2) for seed in range(8)]
        images = await asyncio.gather(*(generate_all(pool, request) for request in requests))
        for one, other in zip(images[::2], images[1::2], strict=True):
            assert one[0].data == other[0].data
        await asyncio.sleep(1.5)
        assert all(engine.image_steps >= 20 for engine in pool.status().engines)

        # After a crash of one, the other runs the requests.
        os.kill(pool.engine_pids()[0], signal.SIGKILL)
        await until(lambda: "recovering" in [engine.state for engine in pool.status().engines])
        async with asyncio.timeout(TIMEOUT_S):
            assert (await generate_all(pool, make_request(num_inference_steps=10, seed=0)))[0].data == images[
                0
            ][0].data


async def test_stopping_the_pool_ends_running_requests(sd_folder: Path) -> None:
    async with start_pool(sd_folder) as pool:
        events = await wait_for_step(pool, long_request(), 1)
        images = asyncio.create_task(remaining_images(events))
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

        await until(is_ready)
        assert states == {"loading", "ready"}
        await until(lambda: "failed" in {engine.state for engine in pool.status().engines})
        assert len(await generate_all(pool, make_request())) == 1
        environment.clear()  # the fault is over
        await until(lambda: {engine.state for engine in pool.status().engines} == {"ready"})
    finally:
        await pool.stop()
