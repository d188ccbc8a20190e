"""The end of the HTTP process: it drains on SIGTERM, and exits with the processes that started it."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from types import FrameType

import psutil

from hypergen.engine_client.pool import EnginePool


def drain_on_sigterm(pool: EnginePool, timeout_s: float) -> None:
    """Start our drain on SIGTERM before uvicorn's, which would end open requests with a plain-text error."""
    loop = asyncio.get_running_loop()
    uvicorn_handler = signal.getsignal(signal.SIGTERM)

    def drain(signum: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(pool.drain, timeout_s)
        if callable(uvicorn_handler):
            uvicorn_handler(signum, frame)

    signal.signal(signal.SIGTERM, drain)


async def leave_with_parent(launcher: int | None) -> None:
    """Terminate this process when its parent processes have exited, so that no orphan keeps the port.

    Args:
        launcher: process id of `hypergen serve`, the parent of BentoML's main process, if it was used.
    """
    parent = os.getppid()
    while os.getppid() == parent:
        with suppress(psutil.Error, ProcessLookupError):  # the parent exited: the loop ends
            # Checked by the parent's ppid, because a zombie launcher still has its process id.
            if launcher is not None and psutil.Process(parent).ppid() != launcher:
                os.kill(parent, signal.SIGTERM)
                return
        await asyncio.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
