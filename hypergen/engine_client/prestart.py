"""A spare engine process: `hypergen serve` starts it before BentoML, so that both import side by side.

The worker's pool adopts it as its first engine, over a socket in a folder that only this user may enter. A
spare that nobody adopts leaves with its launcher.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import psutil

from hypergen.engine_client.environment import engine_environment

# Names the socket and the process to the worker: "PID:PATH".
VARIABLE = "_HYPERGEN_SPARE_ENGINE"


class EngineProcess(Protocol):
    """What the supervisor needs of a process, started or adopted."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self, timeout: float | None = None) -> object:
        """Until the process has ended.

        Raises:
            subprocess.TimeoutExpired: it has not, after so many seconds.
        """
        ...


class Spare:
    """The launcher's side: a process that imports, and waits for a pool.

    Args:
        model_path: the model to be served; its family is imported too.
    """

    def __init__(self, model_path: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="hypergen-"))
        path = self._folder / "engine"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            arguments = ["--spare", str(listener.fileno()), str(model_path)]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "hypergen.engine.worker_main", *arguments],
                pass_fds=[listener.fileno()],
                env=engine_environment(),
                stdin=subprocess.PIPE,  # closed when the launcher is gone
                start_new_session=True,
            )
        # Whoever started a process has to wait for it, or its entry stays and it seems to live.
        threading.Thread(target=self._process.wait, daemon=True).start()
        self.environment = {VARIABLE: f"{self._process.pid}:{path}"}

    def close(self) -> None:
        """The service has ended, and with it an adopted engine."""
        self._process.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class _Adopted:
    """A process that somebody else started, as `EngineProcess`; its exit code is not ours to know."""

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


def adopt() -> tuple[_Adopted, socket.socket] | None:
    """The spare of this process's launcher with a connection to it, if there is one; at most once."""
    pid, _, path = os.environ.pop(VARIABLE, "").partition(":")
    if not path:
        return None
    connection = socket.socket(socket.AF_UNIX)
    try:
        process = _Adopted(int(pid))
        connection.connect(path)
    except (OSError, ValueError, psutil.Error):  # a worker before this one had it
        connection.close()
        return None
    shutil.rmtree(Path(path).parent, ignore_errors=True)  # a launcher that is killed could not
    return process, connection
