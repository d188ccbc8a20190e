"""The service with a monitor of its event loop: python -m scripts.bench.watched PORT FILE.

Settings come from the environment, as for `bentoml serve`. At SIGTERM the measurements are written to FILE.
Like the HTTP process, this module does not import torch.
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


class LoopMonitor:
    """A task on the event loop that sleeps for 2 ms at a time and records when it wakes up.

    Attributes:
        wake_ups: per wake-up four numbers in seconds: monotonic time, then the wall time, the CPU time of the
            loop's thread and the CPU time of the process since the last wake-up.
    """

    def __init__(self) -> None:
        self.wake_ups = array("d")

    async def run(self) -> None:
        wall, thread, process = time.monotonic(), time.thread_time(), time.process_time()
        while True:
            await asyncio.sleep(PAUSE_S)
            before = wall, thread, process
            wall, thread, process = time.monotonic(), time.thread_time(), time.process_time()
            self.wake_ups.extend((wall, wall - before[0], thread - before[1], process - before[2]))


async def _serve(server: uvicorn.Server, monitor: LoopMonitor) -> None:
    monitoring = asyncio.create_task(monitor.run())
    await server.serve()
    monitoring.cancel()


def main() -> None:
    port, file = int(sys.argv[1]), Path(sys.argv[2])
    # uvicorn raises the signal again after its shutdown, which would end the process before FILE is written.
    signal.signal(signal.SIGTERM, lambda *_: None)
    sys.path.insert(0, str(service_folder()))
    service: Any = importlib.import_module("service").HyperGen
    # The configuration of BentoML's worker, see _bentoml_impl/worker/service.py.
    config = uvicorn.Config(
        service.to_asgi(), host="127.0.0.1", port=port, log_config=None, server_header=False
    )
    monitor = LoopMonitor()
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(uvicorn.Server(config), monitor))
    file.write_bytes(monitor.wake_ups.tobytes())


if __name__ == "__main__":
    main()
