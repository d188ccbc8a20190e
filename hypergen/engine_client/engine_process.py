"""One engine process, seen from the HTTP process: start, watchdog and restart."""

from __future__ import annotations

import asyncio
import logging
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from hypergen import ipc
from hypergen.engine_client.accelerators import Accelerator
from hypergen.engine_client.environment import engine_environment
from hypergen.engine_client.prestart import EngineProcess, attach
from hypergen.events import EngineStatus, ForwardPass
from hypergen.model_info import ModelInfo

logger = logging.getLogger(__name__)

EngineMessage = ipc.EventMessage | ipc.Failed | ForwardPass


class Supervisor:
    """Runs one engine process and restarts it. Belongs to the event loop, with a reader and a writer thread.

    Args:
        start: the models that the process loads.
        on_ready: called each time that a process has loaded its models.
        on_message: called with each event or error of a request, and each forward pass.
        on_lost: called when the process has exited; its requests are lost.
    """

    _RELOADS = 3
    _FIRST_RETRY_S = 30.0
    _LAST_RETRY_S = 960.0
    _SHUTDOWN_S = 5.0

    def __init__(
        self,
        start: ipc.Start,
        accelerator: Accelerator,
        *,
        on_ready: Callable[[Supervisor], None],
        on_message: Callable[[Supervisor, EngineMessage], None],
        on_lost: Callable[[Supervisor], None],
    ) -> None:
        self.model_infos: tuple[ModelInfo, ...] = ()
        self.status = EngineStatus(state="loading", device=accelerator.device)
        self._start = start
        self._accelerator = accelerator
        self._on_ready = on_ready
        self._on_message = on_message
        self._on_lost = on_lost
        self._process: EngineProcess | None = None
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._loading = False
        self._load_error: str | None = None
        self._failed_loads = 0
        self._failed_at = 0.0
        self._retry_s = self._FIRST_RETRY_S
        self._restarts = 0
        self._step_seen_at = 0.0
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def launch(self) -> None:
        """Start a process; `on_ready` is called when it has loaded."""
        # The prestarted engine is that of the first accelerator, whose supervisor is launched first.
        process, connection = attach() or _start(self._accelerator.environment)
        outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._process, self._outbox = process, outbox
        self._loading, self._load_error = True, None
        loop = asyncio.get_running_loop()
        for target in (self._read, self._write):
            threading.Thread(target=target, args=(loop, process, connection, outbox), daemon=True).start()
        outbox.put(self._start)

    def send(self, message: ipc.Submit | ipc.Cancel) -> None:
        self._outbox.put(message)

    def kill_if_stalled(self, timeout_s: float) -> None:
        """Kill a process that made no progress for this long; it is then restarted."""
        if (
            self.status.state == "ready"
            and time.monotonic() - self._step_seen_at > timeout_s
            and self._process
        ):
            logger.error(
                "Engine %d made no progress for %.0f s; restarting it.", self._process.pid, timeout_s
            )
            self._process.kill()

    def retry(self) -> None:
        """Launch a failed engine again, after a wait that doubles with each failure."""
        if self.status.state != "failed" or self._loading:
            return
        if time.monotonic() - self._failed_at >= self._retry_s:
            self._retry_s = min(2 * self._retry_s, self._LAST_RETRY_S)
            self._launch_or_give_up()

    async def stop(self) -> None:
        """Ask the process to exit, and kill it if it does not."""
        self._stopping = True
        process = self._process
        if process is None:
            return
        self._outbox.put(ipc.Shutdown())
        try:
            await asyncio.to_thread(process.wait, self._SHUTDOWN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)

    def _read(
        self,
        loop: asyncio.AbstractEventLoop,
        process: EngineProcess,
        connection: socket.socket,
        outbox: Any,
    ) -> None:
        try:
            while (message := ipc.receive(connection)) is not None:
                if not _call_soon(loop, self._received, process, message):
                    return
        except Exception:  # without the kill, the process would never be restarted
            logger.exception("A message from engine %d cannot be read; killing it.", process.pid)
            process.kill()
        connection.close()
        outbox.put(None)
        process.wait()
        _call_soon(loop, self._on_exit, process)

    @staticmethod
    def _write(
        _loop: asyncio.AbstractEventLoop,
        process: EngineProcess,
        connection: socket.socket,
        outbox: Any,
    ) -> None:
        while (message := outbox.get()) is not None:
            try:
                ipc.send(connection, message)
            except OSError:  # the reader thread notices too
                return
            except Exception:  # without the kill, the request would wait forever
                logger.exception("A message to engine %d cannot be sent; killing it.", process.pid)
                process.kill()
                return

    def _received(self, process: EngineProcess, message: Any) -> None:
        if process is not self._process:
            return
        match message:
            case ipc.EventMessage() | ipc.Failed() | ForwardPass():
                self._on_message(self, message)
            case ipc.Heartbeat(step_age_s=step_age_s, status=status):
                self._step_seen_at = time.monotonic() - step_age_s
                self._set_status(status)
            case ipc.Loaded(model_infos=model_infos, status=status):
                self._failed_loads, self._loading, self._retry_s = 0, False, self._FIRST_RETRY_S
                self._step_seen_at = time.monotonic()
                self.model_infos = model_infos
                self._set_status(status)
                self._on_ready(self)
            case ipc.LoadFailed(reason=reason):
                self._load_error = reason

    def _on_exit(self, process: EngineProcess) -> None:
        """Restart an engine that exited, unless its first load failed or `_RELOADS` loads failed in a row."""
        if process is not self._process or self._stopping:
            return
        reason = self._load_error or _exit_reason(process)
        logger.error("Engine process %d exited: %s", process.pid, reason)
        if self._loading:
            self._failed_loads += 1
        else:
            self._restarts += 1
        if not self.model_infos or self._failed_loads >= self._RELOADS:
            self._give_up(reason)
            return
        self._set_status(EngineStatus(state="recovering", reason=reason))
        self._on_lost(self)
        task = asyncio.get_running_loop().create_task(self._relaunch(delay_s=float(self._failed_loads)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _relaunch(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        if not self._stopping:
            self._launch_or_give_up()

    def _launch_or_give_up(self) -> None:
        try:
            self.launch()
        except OSError as error:  # out of memory or processes
            logger.exception("The engine cannot be restarted.")
            self._give_up(f"the engine cannot be started: {error}")

    def _give_up(self, reason: str) -> None:
        self._failed_at, self._loading = time.monotonic(), False
        self._set_status(EngineStatus(state="failed", reason=reason))
        self._on_lost(self)

    def _set_status(self, status: EngineStatus) -> None:
        self.status = replace(
            status, restarts=self._restarts, device=self._accelerator.device or status.device
        )


def _start(environment: Mapping[str, str]) -> tuple[EngineProcess, socket.socket]:
    """A new engine process and our end of a pair of sockets."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "hypergen.engine.worker_main", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=engine_environment(environment),
            stdin=subprocess.DEVNULL,
        )
    return process, ours


def _exit_reason(process: EngineProcess) -> str:
    code = "" if process.returncode is None else f" with code {process.returncode}"
    return f"the engine process ended{code}"


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: Any) -> bool:
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:  # the loop is closed: the server is shutting down
        return False
    return True
