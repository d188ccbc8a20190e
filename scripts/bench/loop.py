"""Delays of the server's event loop while it responds with images of 1024x1024."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from hypergen.errors import HyperGenError
from scripts.bench.servers import GENERATIONS, Server, free_port, running
from scripts.bench.watched import PAUSE_S
from tests.support.random_models import RANDOM_MODELS

_IDLE_S = 5.0
_CLIENTS = 4
_ROUNDS = 3
_BODY: dict[str, Any] = {
    "prompt": "noise",
    "size": "1024x1024",
    "num_inference_steps": 1,
    "guidance_scale": 1.0,
}
# The clients alternate between these requests; a response has several megabytes per image.
_REQUESTS: tuple[dict[str, Any], ...] = (
    {"response_format": "b64_json"},
    {"response_format": "url"},
    {"n": 4, "response_format": "b64_json"},
)


@dataclass(frozen=True)
class Delays:
    """How late a task on the event loop wakes up, in milliseconds.

    Without prefix: on the wall clock, which includes delays by other processes. `own`: the delay that this
    process can have caused. It is at most the CPU time of all its threads since the last wake-up, because any
    thread that holds the GIL blocks the loop. `thread`: the CPU time of the loop's thread alone.
    """

    during: str
    wake_ups: int
    longest_ms: float
    p999_ms: float
    own_longest_ms: float
    own_p999_ms: float
    thread_longest_ms: float


def measure(folder: Path) -> list[Delays]:
    """Measure an idle server, then one with several concurrent clients, with a model that generates noise.

    Args:
        folder: an empty folder for the model, the model store and the log.
    """
    model = folder / "noise"
    logging.disable_progress_bar()  # it would be printed between the tables
    RANDOM_MODELS["tiny"].pipeline().save_pretrained(model)
    port, file = free_port(), folder / "wake-ups"
    environment = {
        "HYPERGEN_MODELS": str(model),
        "HYPERGEN_PORT": str(port),
        # A large batch finishes many images at the same time.
        "HYPERGEN_MAX_BATCH_SIZE": str(_CLIENTS),
    }
    command = [sys.executable, "-m", "scripts.bench.watched", str(port), str(file)]
    periods: dict[str, tuple[float, float]] = {}
    with running(command, port, folder, environment) as server:
        server.wait_for("healthy")
        _request(server, 0)  # the first request of a size waits for its probe
        periods["idle"] = _period(lambda: time.sleep(_IDLE_S))
        periods["answering"] = _period(lambda: _request_concurrently(server))
    wake_ups = np.frombuffer(file.read_bytes()).reshape(-1, 4)
    return [_delays(during, wake_ups, *period) for during, period in periods.items()]


def _period(work: Any) -> tuple[float, float]:
    started = time.monotonic()
    work()
    return started, time.monotonic()


def _request_concurrently(server: Server) -> None:
    with ThreadPoolExecutor(_CLIENTS) as clients:
        for _ in clients.map(lambda number: _request(server, number), range(_CLIENTS * _ROUNDS)):
            pass


def _request(server: Server, number: int) -> None:
    with server.client() as client:
        changes = _REQUESTS[number % len(_REQUESTS)]
        response = client.post(GENERATIONS, json={**_BODY, **changes, "seed": number})
        if response.status_code != 200:
            raise HyperGenError(f"The server responded with {response.status_code}: {response.text[:300]}")
        for item in response.json()["data"]:
            if "url" in item:
                client.get(item["url"]).raise_for_status()


def _delays(during: str, wake_ups: np.ndarray, started: float, ended: float) -> Delays:
    selected = wake_ups[(wake_ups[:, 0] > started) & (wake_ups[:, 0] <= ended)]
    late, thread, process = selected[:, 1] - PAUSE_S, selected[:, 2], selected[:, 3]
    own = np.minimum(late, process)
    return Delays(
        during,
        len(selected),
        _ms(late),
        _ms(late, 99.9),
        _ms(own),
        _ms(own, 99.9),
        _ms(thread),
    )


def _ms(seconds: np.ndarray, percent: float = 100) -> float:
    return float(np.percentile(seconds, percent)) * 1000
