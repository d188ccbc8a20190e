"""A real Redis server for tests."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, RedisError

from tests.support.live_server import free_port


@dataclass(eq=False)
class RedisServer:
    """A server that keeps its data in a folder when it is killed.

    Args:
        options: of redis-server.
    """

    folder: Path
    port: int
    options: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> Redis:
        return Redis(port=self.port)

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--dir", str(self.folder), "--save", ""]
        command += ["--appendonly", "yes", "--appendfsync", "always", *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 30
        with self.client() as client:
            while time.monotonic() < until:
                try:
                    client.ping()
                    return
                except AuthenticationError:  # it wants a password
                    return
                except RedisError:
                    time.sleep(0.02)
        raise AssertionError("redis-server did not start")

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()


@contextmanager
def start_redis(folder: Path, *options: str) -> Iterator[RedisServer]:
    """Skips the test where redis-server is not installed.

    Args:
        folder: an empty folder for its data.
    """
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed; Debian's package redis-server has it")
    folder.mkdir(parents=True, exist_ok=True)
    server = RedisServer(folder, free_port(), options)
    server.start()
    try:
        yield server
    finally:
        server.kill()
