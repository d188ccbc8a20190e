"""The overhead of a single request over the engine's time, and the time from start to first image."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from hypergen.errors import HyperGenError
from scripts.bench.servers import GENERATIONS, Server, serve

SIZES = ("64x64", "256x256")
_FIRST_REQUEST: dict[str, Any] = {"prompt": "a red circle on a blue background", "size": "256x256"}
_STEPS = 4
_COUNT = 50
_WARM_UP = 5  # requests that are not counted: they wait for probes and the connection


@dataclass(frozen=True)
class StartUp:
    """Seconds from the start of `hypergen serve` to each stage, and the line that it prints when ready."""

    http_s: float
    ready_s: float
    first_image_s: float
    ready_line: str


@dataclass(frozen=True)
class Overhead:
    """Single requests, one after another on one connection; in milliseconds.

    `overhead` is the time on the client's clock minus generation and encoding in `Server-Timing`.
    """

    size: str
    requests: int
    wall_p50_ms: float
    generation_p50_ms: float
    overhead_p50_ms: float
    overhead_p95_ms: float


def measure(folder: Path) -> tuple[StartUp, list[Overhead]]:
    """Start the embedded model once to warm up file caches, and measure the second start.

    Args:
        folder: an empty folder for the model store and the log.
    """
    with serve(folder) as server:
        server.wait_for("healthy")
    with serve(folder) as server:
        http_s = server.wait_for()
        ready_s = server.wait_for("healthy")
        with server.client() as client:
            _post(client, _FIRST_REQUEST)
            first_image_s = time.monotonic() - server.started_at
            overheads = [_overhead(client, size) for size in SIZES]
        return StartUp(http_s, ready_s, first_image_s, _ready_line(server)), overheads


def _overhead(client: httpx.Client, size: str) -> Overhead:
    times = np.array([_timed_request(client, size, number) for number in range(_WARM_UP + _COUNT)])
    wall, engine = times[_WARM_UP:].T * 1000
    overhead = wall - engine
    return Overhead(
        size,
        _COUNT,
        float(np.median(wall)),
        float(np.median(engine)),
        float(np.median(overhead)),
        float(np.percentile(overhead, 95)),
    )


def _timed_request(client: httpx.Client, size: str, number: int) -> tuple[float, float]:
    """Seconds on the client's clock, and seconds of generation and encoding from `Server-Timing`."""
    body = {
        # Different for each request, so that the prompt cache has no effect.
        "prompt": f"picture {number}",
        "size": size,
        "num_inference_steps": _STEPS,
        "seed": number,
        "response_format": "b64_json",
    }
    started = time.perf_counter()
    response = _post(client, body)
    wall_s = time.perf_counter() - started
    timing = response.headers["server-timing"]
    return wall_s, sum(float(dur) for dur in re.findall(r"dur=([0-9.]+)", timing)) / 1000


def _post(client: httpx.Client, body: dict[str, Any]) -> httpx.Response:
    response = client.post(GENERATIONS, json=body)
    if response.status_code != 200:
        raise HyperGenError(f"The server responded with {response.status_code}: {response.text[:300]}")
    return response


def _ready_line(server: Server) -> str:
    """The line that `hypergen serve` prints when it is ready."""
    return next((line for line in server.log().splitlines() if "Ready after" in line), "")
