"""A pool with real engine processes, its requests and its crashes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from hypergen.config import Settings
from hypergen.engine_client.accelerators import Accelerator
from hypergen.engine_client.pool import EnginePool
from hypergen.engine_protocol import RequestHandle
from hypergen.events import ImageFinished, Progress, State
from hypergen.request import GenerationRequest
from tests.support.sync_engine import make_request, make_settings, served_model

TIMEOUT_S = 120  # for a busy machine; usually a tenth is enough


@asynccontextmanager
async def start_pool(
    folder: Path, engines: int = 1, state: State = "ready", queue: int = 100, **settings: Any
) -> AsyncGenerator[EnginePool, None]:
    values = {"engine": make_settings(**settings), "queue": {"max_queue_size": queue}}
    pool = EnginePool(Settings.model_validate(values), accelerators=[Accelerator()] * engines)
    await pool.start([served_model(folder, **settings)])
    pids = pool.engine_pids()
    try:
        await until(lambda: all(engine.state == state for engine in pool.status().engines))
        yield pool
    finally:
        await pool.stop()
    assert not any(psutil.pid_exists(pid) for pid in pids)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110  it happens in another process
            await asyncio.sleep(0.02)


async def wait_for_step(pool: EnginePool, request: Any, step: int) -> RequestHandle:
    """Submit a request and return its handle after this step, while it still runs."""
    handle = await pool.submit(request)
    async for event in handle:
        if isinstance(event, Progress) and event.step >= step:
            break
    return handle


def long_request() -> GenerationRequest:
    """It does not finish within a test."""
    return make_request(num_inference_steps=900, width=256, height=256)


async def remaining_images(events: RequestHandle) -> list[ImageFinished]:
    return [event async for event in events if isinstance(event, ImageFinished)]


def kill_engines(pool: EnginePool) -> None:
    for pid in pool.engine_pids():
        os.kill(pid, signal.SIGKILL)
