"""The real service on an event loop that is watched: python -m scripts.bench.watched PORT FILE.

Settings come from the environment, as for `bentoml serve`. What the watcher saw goes to FILE when SIGTERM
ends the process. Like the HTTP half that it watches, this module imports no torch.
"""

from __future__ import annotations

import asyncio
import importlib
import signal
import sys
import time
from array import array
from pathlib import Path
from typing import Any

import uvicorn

from hypergen.cli.serve import service_folder

PAUSE_S = 0.002


class Watcher:
    """A task that wants to wake up every 2 ms, and notes when it did.

    Attributes:
        wake_ups: four numbers for each: the moment on the machine's monotonic clock, and what passed since
            the one before in seconds of the wall, of CPU time of the loop's thread, and of the whole process.
    """

    def __init__(self) -> None:
        self.wake_ups = array("d")

    async def watch(self) -> None:
        wall, thread, process = time.monotonic(), time.thread_time(), time.process_time()
        while True:
            await asyncio.sleep(PAUSE_S)
            before = wall, thread, process
            wall, thread, process = time.monotonic(), time.thread_time(), time.process_time()
            self.wake_ups.extend((wall, wall - before[0], thread - before[1], process - before[2]))


async def _serve(server: uvicorn.Server, watcher: Watcher) -> None:
    watching = asyncio.create_task(watcher.watch())
    await server.serve()
    watching.cancel()


def main() -> None:
    port, file = int(sys.argv[1]), Path(sys.argv[2])
    # uvicorn lets a signal that it has served end the process, which has a file to write first.
    signal.signal(signal.SIGTERM, lambda *_: None)
    sys.path.insert(0, str(service_folder()))
    service: Any = importlib.import_module("service").HyperGen
    # As BentoML's worker sets it up, see _bentoml_impl/worker/service.py.
    config = uvicorn.Config(
        service.to_asgi(), host="127.0.0.1", port=port, log_config=None, server_header=False
    )
    watcher = Watcher()
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(uvicorn.Server(config), watcher))
    file.write_bytes(watcher.wake_ups.tobytes())


if __name__ == "__main__":
    main()
