"""A Redis server and replicas of HyperGen, which are killed and started again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from redis import Redis
from redis.exceptions import RedisError

from hypergen.errors import HyperGenError
from scripts.bench.servers import free_port

_START_S = 300


@dataclass(eq=False)
class Replica:
    """One server process with its engine, on the same port after each start."""

    folder: Path
    arguments: Sequence[str]
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "hypergen.cli.main",
            "serve",
            "--port",
            str(self.port),
            *self.arguments,
        ]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HYPERGEN_")}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**inherited, "BENTOML_HOME": str(self.folder / "bentoml")},
                cwd=self.folder,
            )

    def health(self) -> dict[str, Any]:
        """The body of /health; empty while the replica does not answer."""
        try:
            return httpx.get(f"{self.url}/health", timeout=10, trust_env=False).json()
        except (httpx.HTTPError, ValueError):
            return {}

    def is_healthy(self) -> bool:
        return self.health().get("status") == "healthy"

    def kill(self) -> None:
        """SIGKILL for every process of the replica; BentoML's workers are in sessions of their own."""
        if self.process is None or self.process.poll() is not None:
            return
        main = psutil.Process(self.process.pid)
        processes = [main, *main.children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes[1:], timeout=10)
        self.process.wait()


@dataclass(eq=False)
class Fleet:
    """
    Attributes:
        redis: a client of the Redis that the replicas share.
    """

    replicas: list[Replica]
    redis: Redis

    def wait_until_healthy(self) -> None:
        until = time.monotonic() + _START_S
        while not all(replica.is_healthy() for replica in self.replicas):
            if time.monotonic() > until:
                raise HyperGenError("A replica did not start; see its log.")
            time.sleep(0.2)


@contextmanager
def run_fleet(folder: Path, replicas: int, *arguments: str) -> Iterator[Fleet]:
    """Run Redis and replicas of the embedded model until the end of the block.

    Raises:
        HyperGenError: redis-server is not installed, or something did not start.
    """
    if shutil.which("redis-server") is None:
        raise HyperGenError("redis-server is not installed; Debian's package redis-server has it.")
    port = free_port()
    command = ["redis-server", "--port", str(port), "--dir", str(folder), "--save", "", "--appendonly", "no"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    options = ("--jobs", f"redis://127.0.0.1:{port}/0", "--device", "cpu", *arguments)
    fleet = Fleet(
        [Replica(folder / f"replica{number}", options) for number in range(1, replicas + 1)], Redis(port=port)
    )
    try:
        _wait_for(fleet.redis)
        for replica in fleet.replicas:
            replica.start()
        fleet.wait_until_healthy()
        yield fleet
    finally:
        for replica in fleet.replicas:
            replica.kill()
        fleet.redis.close()
        server.kill()
        server.wait()


def _wait_for(redis: Redis) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with suppress(RedisError):
            redis.ping()
            return
        time.sleep(0.05)
    raise HyperGenError("redis-server did not start.")
