"""A real server for tests: `hypergen serve` in a process, with its own model store and port."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

# Model -> the store of a server that imported it, because the check at an import takes seconds.
_IMPORTED: dict[str, Path] = {}


@dataclass(frozen=True)
class LiveServer:
    """A running server: its address, processes and log."""

    url: str
    process: subprocess.Popen[bytes]
    log_file: Path
    api_key: str | None
    clients: list[openai.OpenAI] = field(default_factory=list[openai.OpenAI])

    def openai(self, **options: Any) -> openai.OpenAI:
        """The official client, by default without retries."""
        options = {"max_retries": 0, "timeout": 120, **options}
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.api_key or "unused", **options)
        self.clients.append(client)
        return client

    def health(self) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return httpx.get(f"{self.url}/health", headers=headers, timeout=10).json()

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def wait_until_running(self) -> None:
        """Wait until the engine runs a request."""
        until = time.monotonic() + 60
        while not self.health()["running"]:
            assert time.monotonic() < until, "the engine got no request"
            time.sleep(0.01)

    def processes(self) -> list[psutil.Process]:
        """Every process of the server, including engines."""
        main = psutil.Process(self.process.pid)
        return [main, *main.children(recursive=True)]

    def engine(self) -> psutil.Process:
        return next(p for p in self.processes() if "hypergen.engine.worker_main" in p.cmdline())


def copy_imported(model: str, home: Path) -> None:
    """Copy a model that a server of this process has imported to another store, unless that exists."""
    if (imported := _IMPORTED.get(model)) and not (home / "models").exists():
        shutil.copytree(imported, home / "models", symlinks=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def start_server(
    folder: Path,
    *arguments: str,
    program: Sequence[str] = (sys.executable, "-m", "hypergen.cli.main", "serve"),
    environment: Mapping[str, str] | None = None,
    api_key: str | None = None,
    wait: bool = True,
) -> Iterator[LiveServer]:
    """Run `hypergen serve ARGUMENTS` until the end of the block.

    Args:
        folder: an empty folder for the model store and the log.
        wait: wait until the model is loaded, not only until the server responds.
    """
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    command = [*program, *arguments, "--port", str(port)]
    home = folder / "bentoml"
    if arguments:
        copy_imported(arguments[0], home)
    variables = {**os.environ, "BENTOML_HOME": str(home), **(environment or {})}
    if api_key:
        variables["HYPERGEN_API_KEY"] = api_key
    log_file = folder / "server.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=variables, cwd=folder)
    server = LiveServer(f"http://127.0.0.1:{port}", process, log_file, api_key)
    try:
        _wait_for(server, loaded=wait)
        if arguments and wait and (home / "models").is_dir():
            _IMPORTED.setdefault(arguments[0], home / "models")
        yield server
    finally:
        for client in server.clients:
            client.close()
        processes = server.processes() if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            for remaining in processes:
                remaining.kill()
            raise


def _wait_for(server: LiveServer, loaded: bool) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if server.process.poll() is not None:
            raise AssertionError(f"The server exited with {server.process.returncode}:\n{server.log()}")
        try:
            status = server.health()["status"]
        except (httpx.HTTPError, ValueError):
            status = None
        if status == "healthy" or (status and not loaded):
            return
        time.sleep(0.1)
    raise AssertionError(f"The server was not ready in time:\n{server.log()}")
