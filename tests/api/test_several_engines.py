"""A server with two engines, which are processes on the CPU here as they are on two GPUs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.http_client import GENERATIONS, client_of
from tests.support.live_server import LiveServer, start_server
from tests.support.metric_samples import wait_for

_TIMEOUT_S = 300  # for a busy machine
LONG = {"prompt": "a cat", "size": "64x64", "num_inference_steps": 100, "seed": 3}


@pytest.fixture(scope="module")
def two_engines(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Iterator[LiveServer]:
    """A server with two engines, both ready."""
    arguments = (str(sd_folder), "--devices", "cpu,cpu", "--dtype", "float32", "--max-batch-size", "1")
    with start_server(tmp_path_factory.mktemp("two"), *arguments) as server:
        _until(lambda: _states(server) == ["ready", "ready"])
        yield server


def _until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + _TIMEOUT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def _states(server: LiveServer) -> list[str]:
    return [engine["state"] for engine in server.health()["engines"]]


def _engines(server: LiveServer) -> list[psutil.Process]:
    return [p for p in server.processes() if "hypergen.engine.worker_main" in p.cmdline()]


def _image(client: httpx.Client, **changes: Any) -> str:
    response = client.post(GENERATIONS, json={**LONG, **changes}, timeout=_TIMEOUT_S)
    assert response.status_code == 200, response.text
    return response.json()["data"][0]["b64_json"]


def test_health_and_metrics_are_those_of_both_engines(two_engines: LiveServer) -> None:
    health = two_engines.health()
    assert (health["status"], health["device"], health["reason"]) == ("healthy", "cpu", None)
    for engine in health["engines"]:
        assert (engine["device"], engine["requests"], len(engine["models"])) == ("cpu", 0, 1)
    with client_of(two_engines) as client:
        for number in ("0", "1"):
            wait_for(client, "hypergen_engine_up", lambda value: value == 1, engine=number)


def test_both_engines_generate_and_a_seed_gives_the_same_bytes(two_engines: LiveServer) -> None:
    before = [engine["image_steps"] for engine in two_engines.health()["engines"]]
    with client_of(two_engines) as client, ThreadPoolExecutor(8) as threads:
        alone = _image(client)
        assert set(threads.map(lambda _: _image(client), range(8))) == {alone}
    _until(
        lambda: all(
            engine["image_steps"] > steps
            for engine, steps in zip(two_engines.health()["engines"], before, strict=True)
        )
    )


def test_a_killed_engine_comes_back_and_no_request_is_lost(two_engines: LiveServer) -> None:
    with client_of(two_engines) as client, ThreadPoolExecutor(10) as threads:
        alone = _image(client)
        tasks = [threads.submit(_image, client) for _ in range(10)]
        _until(lambda: all(engine["requests"] for engine in two_engines.health()["engines"]))
        victim = _engines(two_engines)[-1]
        victim.kill()
        assert {task.result(_TIMEOUT_S) for task in tasks} == {alone}
    _until(lambda: _states(two_engines) == ["ready", "ready"])
    assert sum(engine["restarts"] for engine in two_engines.health()["engines"]) == 1
    assert two_engines.health()["queue_size"] == 0
