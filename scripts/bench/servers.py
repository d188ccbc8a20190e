"""Servers in processes of their own, as a benchmark starts, asks and stops them."""

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
_LOOK_S = 0.02


@dataclass(frozen=True)
class Server:
    """A process that serves, or will.

    Attributes:
        started_at: when the process was started, in seconds of the monotonic clock.
    """

    url: str
    process: subprocess.Popen[bytes]
    log_file: Path
    started_at: float

    def wait_for(self, *states: str) -> float:
        """Until /health tells one of these states, any state without; seconds since the start.

        Raises:
            HyperGenError: the server ended, or takes far too long.
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
                time.sleep(_LOOK_S)
        last = "\n".join(self.log().splitlines()[-15:])
        raise HyperGenError(f"The server did not start; the end of its log:\n{last}")

    def client(self) -> httpx.Client:
        """One that keeps its connection and asks no proxy."""
        return httpx.Client(base_url=self.url, timeout=600, trust_env=False)

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")


@contextmanager
def serve(folder: Path, *arguments: str) -> Iterator[Server]:
    """`hypergen serve ARGUMENTS` with a model store in `folder`."""
    port = free_port()
    command = [sys.executable, "-m", "hypergen.cli.main", "serve", *arguments, "--port", str(port)]
    with running(command, port, folder, {}) as server:
        yield server


@contextmanager
def running(
    command: Sequence[str], port: int, folder: Path, environment: Mapping[str, str]
) -> Iterator[Server]:
    """A process of its own until the block is left.

    Args:
        folder: for the model store and the log; a second server finds what the first left there.
        environment: added to this process's own, without the settings of HyperGen in it.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HYPERGEN_")}
    given = {**inherited, "BENTOML_HOME": str(folder / "bentoml"), **environment}
    log_file = folder / "server.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=given, cwd=folder)
    try:
        yield Server(f"http://127.0.0.1:{port}", process, log_file, time.monotonic())
    finally:
        _stop(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    everyone = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
    for left in psutil.wait_procs(everyone, timeout=5)[1]:
        left.kill()
