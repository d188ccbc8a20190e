"""How long the event loop is held up while pictures of 1024x1024 are answered."""

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
# What the clients ask for in turns; every answer is several megabytes, that with all pictures many times so.
_ANSWERS: tuple[dict[str, Any], ...] = (
    {"response_format": "b64_json"},
    {"response_format": "url"},
    {"n": 4, "response_format": "b64_json"},
)


@dataclass(frozen=True)
class Delays:
    """How late the watcher on the loop woke up, in milliseconds.

    On the wall, that is also as late as other processes make it. `own` is what this process can have caused:
    the lateness on the wall, but at most the CPU time that all its threads spent meanwhile, because a thread
    that holds the interpreter's lock blocks the loop as well as the loop's own. `thread` is the CPU time
    of the loop's thread alone.
    """

    during: str
    wake_ups: int
    longest_ms: float
    p999_ms: float
    own_longest_ms: float
    own_p999_ms: float
    thread_longest_ms: float


def measure(folder: Path) -> list[Delays]:
    """Watch an idle server, then one that several clients ask for noise at the same time.

    Args:
        folder: an empty one, for the model, its store and the log.
    """
    model = folder / "noise"
    logging.disable_progress_bar()  # of saving, which would stand between the tables
    RANDOM_MODELS["tiny"].pipeline().save_pretrained(model)
    port, file = free_port(), folder / "wake-ups"
    environment = {
        "HYPERGEN_MODELS": str(model),
        "HYPERGEN_PORT": str(port),
        # The larger it is, the more pictures are ready at the same time.
        "HYPERGEN_MAX_BATCH_SIZE": str(_CLIENTS),
    }
    command = [sys.executable, "-m", "scripts.bench.watched", str(port), str(file)]
    periods: dict[str, tuple[float, float]] = {}
    with running(command, port, folder, environment) as server:
        server.wait_for("healthy")
        _ask(server, 0)  # the first of a size is probed
        periods["idle"] = _period(lambda: time.sleep(_IDLE_S))
        periods["answering"] = _period(lambda: _ask_together(server))
    wake_ups = np.frombuffer(file.read_bytes()).reshape(-1, 4)
    return [_delays(during, wake_ups, *period) for during, period in periods.items()]


def _period(work: Any) -> tuple[float, float]:
    started = time.monotonic()
    work()
    return started, time.monotonic()


def _ask_together(server: Server) -> None:
    with ThreadPoolExecutor(_CLIENTS) as clients:
        for _ in clients.map(lambda number: _ask(server, number), range(_CLIENTS * _ROUNDS)):
            pass


def _ask(server: Server, number: int) -> None:
    with server.client() as client:
        asked = _ANSWERS[number % len(_ANSWERS)]
        response = client.post(GENERATIONS, json={**_BODY, **asked, "seed": number})
        if response.status_code != 200:
            raise HyperGenError(f"The server answered {response.status_code}: {response.text[:300]}")
        for item in response.json()["data"]:
            if "url" in item:
                client.get(item["url"]).raise_for_status()


def _delays(during: str, wake_ups: np.ndarray, started: float, ended: float) -> Delays:
    inside = wake_ups[(wake_ups[:, 0] > started) & (wake_ups[:, 0] <= ended)]
    late, thread, process = inside[:, 1] - PAUSE_S, inside[:, 2], inside[:, 3]
    own = np.minimum(late, process)
    return Delays(
        during,
        len(inside),
        _ms(late),
        _ms(late, 99.9),
        _ms(own),
        _ms(own, 99.9),
        _ms(thread),
    )


def _ms(seconds: np.ndarray, percent: float = 100) -> float:
    return float(np.percentile(seconds, percent)) * 1000
