"""The pool with real engine processes: who draws, who dies, and what the client sees of it."""

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
from hypergen.engine_client.pool import EnginePool
from hypergen.engine_protocol import RequestHandle, generate_all
from hypergen.errors import GenerationError, RequestError, UnavailableError
from hypergen.events import ImageFinished, Progress, Started, State
from hypergen.request import GenerationRequest, InputImage
from tests.support.sync_engine import make_request, make_settings, served_model

_PATIENCE_S = 120  # for a busy machine; nothing here takes a tenth of it


@asynccontextmanager
async def _pool(
    folder: Path, engines: int = 1, state: State = "ready", queue: int = 100, **settings: Any
) -> AsyncGenerator[EnginePool, None]:
    everything = {"engine": make_settings(**settings), "queue": {"max_queue_size": queue}}
    pool = EnginePool(Settings.model_validate(everything), accelerators=[{}] * engines)
    await pool.start([served_model(folder, **settings)])
    pids = pool.engine_pids()
    try:
        await _until(lambda: all(engine.state == state for engine in pool.status().engines))
        yield pool
    finally:
        await pool.stop()
    assert not any(psutil.pid_exists(pid) for pid in pids)


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(_PATIENCE_S):
        while not condition():  # noqa: ASYNC110  what is awaited happens in another process
            await asyncio.sleep(0.02)


async def _wait_for_step(pool: EnginePool, request: Any, step: int) -> RequestHandle:
    """Start a request and give it back, still running, once it has taken so many steps."""
    handle = await pool.submit(request)
    async for event in handle:
        if isinstance(event, Progress) and event.step >= step:
            break
    return handle


def _endless() -> GenerationRequest:
    """Much longer than any test waits."""
    return make_request(num_inference_steps=900, width=256, height=256)


async def _rest(events: RequestHandle) -> list[ImageFinished]:
    return [event async for event in events if isinstance(event, ImageFinished)]


def _kill(pool: EnginePool) -> None:
    for pid in pool.engine_pids():
        os.kill(pid, signal.SIGKILL)


async def test_whoever_hangs_up_leaves_the_queue_and_the_engine(sd_folder: Path) -> None:
    async with _pool(sd_folder, queue=1, max_batch_size=1) as pool:
        running = await _wait_for_step(pool, _endless(), 3)
        waiting = asyncio.create_task(generate_all(pool, _endless()))
        overflow = asyncio.create_task(generate_all(pool, _endless()))
        await _until(lambda: pool.status().overflow == 1)
        assert pool.status().queue_size == 3

        overflow.cancel()
        await _until(lambda: pool.status().overflow == 0)
        waiting.cancel()
        running.cancel()
        await asyncio.gather(waiting, overflow, return_exceptions=True)
        assert pool.status().queue_size == 0

        # The engine is free at once, and takes no step for those who left.
        (image,) = await generate_all(pool, make_request())
        assert image.shared_forwards == 0
        await asyncio.sleep(1.5)
        steps = pool.status().engines[0].image_steps
        await asyncio.sleep(1.5)
        assert pool.status().engines[0].image_steps == steps


async def test_submit_does_not_wait_for_the_overflow_queue(sd_folder: Path) -> None:
    async with _pool(sd_folder, queue=1, max_batch_size=1) as pool:
        running = await _wait_for_step(pool, _endless(), 1)
        waiting, in_overflow = await pool.submit(_endless()), await pool.submit(make_request())
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
        # It is admitted and generated although nobody reads its events.
        await _until(lambda: in_overflow.state == "finished")
        assert in_overflow.queue_position() is None
        assert len(await _rest(in_overflow)) == len(await _rest(running)) + 1 == 1
        assert running.state == waiting.state == "cancelled"


async def test_signals_meant_for_the_server_do_not_end_an_engine(sd_folder: Path) -> None:
    async with _pool(sd_folder) as pool:
        events = await _wait_for_step(pool, make_request(num_inference_steps=30), 1)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(pool.engine_pids()[0], number)
        assert len(await _rest(events)) == 1
        assert pool.status().engines[0].restarts == 0


async def test_what_a_dying_engine_had_is_drawn_again_with_the_same_bytes(sd_folder: Path) -> None:
    async with _pool(sd_folder, aging=0) as pool:
        first = make_request(n=2, num_inference_steps=20, width=256, height=256, sampler="euler_a")
        others = [make_request(num_inference_steps=60, seed=seed) for seed in range(3)]
        undisturbed = [await generate_all(pool, request) for request in (first, *others)]

        again = [
            make_request(n=2, num_inference_steps=20, width=256, height=256, sampler="euler_a"),
            *(make_request(num_inference_steps=60, seed=seed) for seed in range(3)),
        ]
        running = [await _wait_for_step(pool, request, 1) for request in again]
        _kill(pool)
        await _until(lambda: pool.status().state == "recovering")
        with pytest.raises(UnavailableError):
            await generate_all(pool, make_request())
        async with asyncio.timeout(_PATIENCE_S):
            images = await asyncio.gather(*(_rest(events) for events in running))
        for got, wanted in zip(images, undisturbed, strict=True):
            assert sorted(image.index for image in got) == list(range(len(wanted)))
            assert [i.data for i in sorted(got, key=lambda i: i.index)] == [i.data for i in wanted]
        assert pool.status().engines[0].restarts == 1
        assert pool.status().queue_size == 0


async def test_a_picture_that_was_delivered_is_not_delivered_again(sd_folder: Path) -> None:
    async with _pool(sd_folder, max_batch_size=1, aging=0) as pool:
        events = await pool.submit(make_request(n=2, num_inference_steps=60))
        delivered: list[int] = []
        async for event in events:
            if isinstance(event, ImageFinished):
                delivered.append(event.index)
                if len(delivered) == 1:
                    _kill(pool)
        assert sorted(delivered) == [0, 1]


async def test_a_request_that_kills_engines_is_found_and_the_others_live(sd_folder: Path) -> None:
    async with _pool(sd_folder) as pool:
        poison = await _wait_for_step(pool, _endless(), 1)
        innocent = await _wait_for_step(pool, make_request(num_inference_steps=300), 1)
        innocent_images = asyncio.create_task(_rest(innocent))
        _kill(pool)
        async with asyncio.timeout(_PATIENCE_S):
            while not isinstance(await anext(poison), Started):  # for the second time
                pass
        _kill(pool)
        with pytest.raises(GenerationError) as error:
            await _rest(poison)
        assert error.value.code == "poison"
        async with asyncio.timeout(_PATIENCE_S):
            assert len(await innocent_images) == 1
            assert len(await generate_all(pool, make_request())) == 1


async def test_requests_end_when_an_engine_cannot_come_back(sd_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd_folder, tmp_path / "model")
    async with _pool(folder) as pool:
        running = await _wait_for_step(pool, _endless(), 1)
        shutil.rmtree(folder)
        _kill(pool)
        async with asyncio.timeout(_PATIENCE_S):
            with pytest.raises(UnavailableError):
                await _rest(running)
        await _until(lambda: pool.status().state == "failed")
        assert pool.status().reason
        with pytest.raises(UnavailableError):
            await generate_all(pool, make_request())


async def test_a_client_that_reads_nothing_holds_neither_queue_nor_engine(sd_folder: Path) -> None:
    async with _pool(sd_folder, queue=1) as pool:
        mute = await pool.submit(make_request(num_inference_steps=4))
        assert await anext(mute)
        await _until(lambda: pool.status().queue_size == 0)  # the engine has finished

        # A crash that comes then is none of its business, and nothing waits for it.
        _kill(pool)
        await _until(lambda: pool.status().state == "recovering")
        await _until(lambda: pool.status().state == "ready")
        async with asyncio.timeout(_PATIENCE_S):
            assert len(await generate_all(pool, make_request())) == 1
        assert len(await _rest(mute)) == 1
        assert pool.status().engines[0].restarts == 1


async def test_input_images_that_are_given_back_to_a_client_that_reads_nothing_hold_no_place(
    sd_folder: Path,
) -> None:
    """With strength 0 nothing is denoised, so the request never starts."""
    image = InputImage(64, 64, bytes(64 * 64 * 3))
    async with _pool(sd_folder, queue=1) as pool:
        mutes = [await pool.submit(make_request(image=image, strength=0.0, n=2)) for _ in range(3)]
        for mute in mutes:
            async with asyncio.timeout(_PATIENCE_S):
                assert isinstance(await anext(mute), ImageFinished)
        await _until(lambda: pool.status().queue_size == 0)
        assert len(await generate_all(pool, make_request())) == 1
        for mute in mutes:
            assert len(await _rest(mute)) == 1


async def test_what_waits_for_a_recovering_engine_goes_to_the_one_that_is_ready_sooner(
    sd_folder: Path,
) -> None:
    async with _pool(sd_folder, engines=2, max_batch_size=1) as pool:
        requests = [make_request(num_inference_steps=60, seed=seed) for seed in range(8)]
        drawing = [asyncio.create_task(generate_all(pool, request)) for request in requests]
        await _until(lambda: pool.status().running >= 2)
        assert pool.status().waiting >= 2
        first, second = pool.engine_pids()
        os.kill(second, signal.SIGKILL)
        await _until(lambda: second not in pool.engine_pids())
        slow = pool.engine_pids()[1]
        os.kill(slow, signal.SIGSTOP)  # it does not come back for now
        try:
            os.kill(first, signal.SIGKILL)
            await _until(lambda: first not in pool.engine_pids())
            # What had started is tried again alone by its own engine; the first does all that waited.
            await _until(lambda: pool.status().waiting == 0)
            assert [engine.state for engine in pool.status().engines] == ["ready", "recovering"]
        finally:
            os.kill(slow, signal.SIGCONT)
        async with asyncio.timeout(_PATIENCE_S):
            assert [len(images) for images in await asyncio.gather(*drawing)] == [1] * 8


async def test_a_drain_also_ends_what_waits_in_the_overflow_queue(sd_folder: Path) -> None:
    async with _pool(sd_folder, queue=1, max_batch_size=1) as pool:
        drawing = [asyncio.create_task(generate_all(pool, _endless())) for _ in range(5)]
        await _until(lambda: pool.status().queue_size == 5)
        await _until(lambda: pool.status().running == 1)
        pool.drain(0.2)
        async with asyncio.timeout(_PATIENCE_S):
            ends = await asyncio.gather(*drawing, return_exceptions=True)
        assert {getattr(end, "code", None) for end in ends} == {"draining"}
        assert pool.status().queue_size == 0


async def test_a_model_that_cannot_be_loaded_is_told_once_and_not_tried_again(
    sd_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sd_folder, tmp_path / "model")
    shutil.rmtree(folder / "unet")
    async with _pool(folder, state="failed") as pool:
        assert "model" in (pool.status().reason or "")
        assert pool.model_info() is None
        with pytest.raises(UnavailableError):
            await generate_all(pool, make_request())


async def test_stopping_while_the_model_loads_leaves_nothing_behind(sd_folder: Path) -> None:
    async with _pool(sd_folder, state="loading") as pool:
        with pytest.raises(UnavailableError):
            await generate_all(pool, make_request())


async def test_an_engine_that_stands_still_is_started_again(sd_folder: Path) -> None:
    async with _pool(sd_folder, engine_stall_timeout_s=10) as pool:
        events = await _wait_for_step(pool, make_request(num_inference_steps=100), 1)
        os.kill(pool.engine_pids()[0], signal.SIGSTOP)
        async with asyncio.timeout(_PATIENCE_S):
            assert len(await _rest(events)) == 1
        assert pool.status().engines[0].restarts == 1


async def test_two_engines_share_the_work_and_draw_the_same_bytes(sd_folder: Path) -> None:
    async with _pool(sd_folder, engines=2, max_batch_size=1) as pool:
        requests = [make_request(num_inference_steps=10, seed=seed // 2) for seed in range(8)]
        images = await asyncio.gather(*(generate_all(pool, request) for request in requests))
        for one, other in zip(images[::2], images[1::2], strict=True):
            assert one[0].data == other[0].data
        await asyncio.sleep(1.5)
        assert all(engine.image_steps >= 20 for engine in pool.status().engines)

        # With one of them gone, the other takes what comes.
        os.kill(pool.engine_pids()[0], signal.SIGKILL)
        await _until(lambda: "recovering" in [engine.state for engine in pool.status().engines])
        async with asyncio.timeout(_PATIENCE_S):
            assert (await generate_all(pool, make_request(num_inference_steps=10, seed=0)))[0].data == images[
                0
            ][0].data


async def test_stopping_the_pool_ends_what_runs(sd_folder: Path) -> None:
    async with _pool(sd_folder) as pool:
        events = await _wait_for_step(pool, _endless(), 1)
        rest = asyncio.create_task(_rest(events))
        await pool.stop()
        with pytest.raises(RequestError) as error:
            await rest
        assert error.value.code == "draining"


_PARENT = """
import asyncio, sys
from pathlib import Path
from hypergen.load_settings import load_settings
from hypergen.engine_client.pool import EnginePool
from hypergen.served_model import ServedModel

async def main():
    settings = load_settings(flags={"device": "cpu"})
    pool = EnginePool(settings, accelerators=[{}])
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
def test_an_engine_leaves_when_its_parent_is_killed(sd_folder: Path, moment: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(sd_folder), moment], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    with parent.stdout:
        engine = psutil.Process(int(parent.stdout.readline()))
        if moment == "loaded":
            assert parent.stdout.readline() == "ready\n"
        else:
            time.sleep(2)  # in the middle of its imports
        parent.kill()
        parent.wait()
        # Not `Process.wait`: the engine is not our child, and whoever inherits it may be slow to bury it.
        until = time.monotonic() + (2 if moment == "loaded" else 20)
        while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until
            time.sleep(0.05)


async def test_an_engine_that_cannot_load_does_not_fail_a_server_whose_other_one_loads(
    sd_folder: Path,
) -> None:
    settings = Settings.model_validate({"engine": make_settings()})
    pool = EnginePool(settings, accelerators=[{}, {"PYTHONHOME": "/nowhere"}])
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
    finally:
        await pool.stop()
