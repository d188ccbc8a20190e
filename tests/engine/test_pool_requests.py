"""Requests to a pool whose one engine process is shared by the tests of this file."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import pytest_asyncio

from hypergen.engine_client.pool import EnginePool
from hypergen.engine_protocol import generate_all
from hypergen.events import ImageFinished
from hypergen.request import InputImage
from tests.support.engine_pools import (
    TIMEOUT_S,
    kill_engines,
    long_request,
    remaining_images,
    start_pool,
    until,
    wait_for_step,
)
from tests.support.sync_engine import make_request

# One event loop, which reads the engine's heartbeats.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running_pool(sd_folder: Path) -> AsyncGenerator[EnginePool, None]:
    async with start_pool(sd_folder, queue=1, max_batch_size=1, aging=0) as pool:
        yield pool


@pytest_asyncio.fixture(loop_scope="module")
async def pool(running_pool: EnginePool) -> EnginePool:
    """One engine for several tests, idle; an image at a time, one request in the queue."""
    await until(lambda: running_pool.status().queue_size == 0 and running_pool.status().state == "ready")
    return running_pool


async def test_cancelled_requests_leave_the_queue_and_the_engine(pool: EnginePool) -> None:
    running = await wait_for_step(pool, long_request(), 3)
    waiting = asyncio.create_task(generate_all(pool, long_request()))
    overflow = asyncio.create_task(generate_all(pool, long_request()))
    await until(lambda: pool.status().overflow == 1)
    assert pool.status().queue_size == 3

    overflow.cancel()
    await until(lambda: pool.status().overflow == 0)
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


async def test_submit_does_not_wait_for_the_overflow_queue(pool: EnginePool) -> None:
    running = await wait_for_step(pool, long_request(), 1)
    waiting, in_overflow = await pool.submit(long_request()), await pool.submit(make_request())
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
    await until(lambda: in_overflow.state == "finished")
    assert in_overflow.queue_position() is None
    assert len(await remaining_images(in_overflow)) == len(await remaining_images(running)) + 1 == 1
    assert running.state == waiting.state == "cancelled"


async def test_signals_for_the_server_do_not_stop_an_engine(pool: EnginePool) -> None:
    restarts = pool.status().engines[0].restarts
    events = await wait_for_step(pool, make_request(num_inference_steps=30), 1)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(pool.engine_pids()[0], number)
    assert len(await remaining_images(events)) == 1
    assert pool.status().engines[0].restarts == restarts


async def test_an_image_is_delivered_once_despite_a_crash(pool: EnginePool) -> None:
    events = await pool.submit(make_request(n=2, num_inference_steps=60))
    delivered: list[int] = []
    async for event in events:
        if isinstance(event, ImageFinished):
            delivered.append(event.index)
            if len(delivered) == 1:
                kill_engines(pool)
    assert sorted(delivered) == [0, 1]


async def test_a_client_that_reads_no_events_blocks_neither_queue_nor_engine(pool: EnginePool) -> None:
    restarts = pool.status().engines[0].restarts
    handle = await pool.submit(make_request(num_inference_steps=4))
    assert await anext(handle)
    await until(lambda: pool.status().queue_size == 0)  # the engine has finished

    # A later crash does not affect it.
    kill_engines(pool)
    await until(lambda: pool.status().state == "recovering")
    await until(lambda: pool.status().state == "ready")
    async with asyncio.timeout(TIMEOUT_S):
        assert len(await generate_all(pool, make_request())) == 1
    assert len(await remaining_images(handle)) == 1
    assert pool.status().engines[0].restarts == restarts + 1


async def test_requests_without_denoising_leave_the_queue_if_no_client_reads_their_events(
    pool: EnginePool,
) -> None:
    """With strength 0 nothing is denoised, so the request never starts."""
    image = InputImage(64, 64, bytes(64 * 64 * 3))
    handles = [await pool.submit(make_request(image=image, strength=0.0, n=2)) for _ in range(3)]
    for handle in handles:
        async with asyncio.timeout(TIMEOUT_S):
            assert isinstance(await anext(handle), ImageFinished)
    await until(lambda: pool.status().queue_size == 0)
    assert len(await generate_all(pool, make_request())) == 1
    for handle in handles:
        assert len(await remaining_images(handle)) == 1
