"""A prestarted engine process: `hypergen serve` starts it before BentoML, so that both import in parallel.

The worker's pool attaches to it as its first engine, over a socket in a folder that only this user may enter.
A prestarted engine without a pool exits with its launcher.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import psutil

from hypergen.engine_client.environment import engine_environment

# Names the socket and the process to the worker: "PID:PATH".
VARIABLE = "_HYPERGEN_PRESTARTED_ENGINE"


class EngineProcess(Protocol):
    """The methods of `subprocess.Popen` that the supervisor uses."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self, timeout: float | None = None) -> object:
        """Wait until the process has exited.

        Raises:
            subprocess.TimeoutExpired: it has not after `timeout` seconds.
        """
        ...


class PrestartedEngine:
    """The launcher's side: a process that imports torch and the model's family, and waits for a pool.

    Args:
        model_path: the model to serve; it determines the family.
        environment: of the first accelerator.
    """

    def __init__(self, model_path: Path, environment: Mapping[str, str] | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="hypergen-"))
        path = self._folder / "engine"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            arguments = ["--prestarted", str(listener.fileno()), str(model_path)]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "hypergen.engine.worker_main", *arguments],
                pass_fds=[listener.fileno()],
                env=engine_environment(environment),
                stdin=subprocess.PIPE,  # closed when the launcher exits
                start_new_session=True,
            )
        # Without this wait, the process would stay a zombie after its exit and psutil would find it.
        threading.Thread(target=self._process.wait, daemon=True).start()
        self.environment = {VARIABLE: f"{self._process.pid}:{path}"}

    def close(self) -> None:
        """Kill the engine after the service has ended."""
        self._process.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class _AttachedProcess:
    """An `EngineProcess` that another process started, so its exit code is unknown."""

    returncode = None

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.pid = pid

    def kill(self) -> None:
        with suppress(psutil.NoSuchProcess):
            self._process.kill()

    def wait(self, timeout: float | None = None) -> None:
        try:
            self._process.wait(timeout)
        except psutil.TimeoutExpired:
            raise subprocess.TimeoutExpired("the engine", timeout or 0) from None


def attach() -> tuple[_AttachedProcess, socket.socket] | None:
    """The launcher's prestarted engine and a connection to it, if there is one; at most once."""
    pid, _, path = os.environ.pop(VARIABLE, "").partition(":")
    if not path:
        return None
    connection = socket.socket(socket.AF_UNIX)
    try:
        process = _AttachedProcess(int(pid))
        connection.connect(path)
    except (OSError, ValueError, psutil.Error):  # an earlier worker attached to it
        connection.close()
        return None
    shutil.rmtree(Path(path).parent, ignore_errors=True)  # a launcher that is killed cannot
    return process, connection
