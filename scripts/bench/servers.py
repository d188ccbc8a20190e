"""Server processes for benchmarks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from hypergen.errors import HyperGenError

GENERATIONS = "/v1/images/generations"
_START_S = 180
_STOP_S = 60
_POLL_S = 0.02


@dataclass(frozen=True)
class Server:
    """A server process, ready or starting.

    Attributes:
        started_at: when the process was started, monotonic seconds.
    """

    url: str
    process: subprocess.Popen[bytes]
    log_file: Path
    started_at: float

    def wait_for(self, *states: str) -> float:
        """Wait until the status in /health is one of `states`, or any if none is given.

        Returns:
            Seconds since the start of the process.

        Raises:
            HyperGenError: the server exited, or did not start within 180 s.
        """
        with self.client() as client:
            while time.monotonic() - self.started_at < _START_S:
                if self.process.poll() is not None:
                    break
                try:
                    state = client.get("/health").json()["status"]
                except (httpx.HTTPError, ValueError):
                    state = ""
                if state and (not states or state in states):
                    return time.monotonic() - self.started_at
                time.sleep(_POLL_S)
        log_end = "\n".join(self.log().splitlines()[-15:])
        raise HyperGenError(f"The server did not start; the end of its log:\n{log_end}")

    def client(self) -> httpx.Client:
        """A client that keeps its connection and uses no proxy."""
        return httpx.Client(base_url=self.url, timeout=600, trust_env=False)

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")


@contextmanager
def serve(folder: Path, *arguments: str) -> Iterator[Server]:
    """Run `hypergen serve ARGUMENTS` with a model store in `folder`."""
    port = free_port()
    command = [sys.executable, "-m", "hypergen.cli.main", "serve", *arguments, "--port", str(port)]
    with running(command, port, folder, {}) as server:
        yield server


@contextmanager
def running(
    command: Sequence[str], port: int, folder: Path, environment: Mapping[str, str]
) -> Iterator[Server]:
    """Run a server process for the duration of the block.

    Args:
        folder: for the model store and the log; a second server uses the same store.
        environment: added to the environment of this process, without its HYPERGEN variables.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HYPERGEN_")}
    variables = {**inherited, "BENTOML_HOME": str(folder / "bentoml"), **environment}
    log_file = folder / "server.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=variables, cwd=folder)
    try:
        yield Server(f"http://127.0.0.1:{port}", process, log_file, time.monotonic())
    finally:
        _stop(process)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
    for child in psutil.wait_procs(children, timeout=5)[1]:
        child.kill()
