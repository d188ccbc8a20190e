"""How the HTTP process ends: a drain on SIGTERM, and not without the processes that started it."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from types import FrameType

import psutil

from hypergen.engine_client.pool import EnginePool


def drain_on_sigterm(pool: EnginePool, timeout_s: float) -> None:
    """Let SIGTERM start our drain before uvicorn's, which would end what is left with a plain-text error."""
    loop = asyncio.get_running_loop()
    uvicorn_handler = signal.getsignal(signal.SIGTERM)

    def drain(signum: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(pool.drain, timeout_s)
        if callable(uvicorn_handler):
            uvicorn_handler(signum, frame)

    signal.signal(signal.SIGTERM, drain)


async def leave_with_parent(launcher: int | None) -> None:
    """End this process when those that started it are gone: killing them leaves no orphan on the port.

    Args:
        launcher: process id of the `hypergen serve` above BentoML's main process, if there is one.
    """
    parent = os.getppid()
    while os.getppid() == parent:
        with suppress(psutil.Error, ProcessLookupError):  # the parent is gone: the next look says so
            # Asked of the parent, because a process that nobody waited for still has its id.
            if launcher is not None and psutil.Process(parent).ppid() != launcher:
                os.kill(parent, signal.SIGTERM)
                return
        await asyncio.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
