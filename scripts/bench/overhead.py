"""What a lone request costs beyond the engine, and how long after a start the first one is answered."""

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
_FIRST_PICTURE: dict[str, Any] = {"prompt": "a red circle on a blue background", "size": "256x256"}
_STEPS = 4
_COUNT = 50
_UNCOUNTED = 5  # the first requests of a size are probed, and the first of a connection are slower


@dataclass(frozen=True)
class StartUp:
    """Seconds from the start of `hypergen serve` to each stage, and what the server said itself."""

    http_s: float
    ready_s: float
    first_picture_s: float
    said: str


@dataclass(frozen=True)
class Overhead:
    """Lone requests, one after another on one connection; milliseconds.

    `overhead` is what a request took on the client's clock less what the server says that drawing and
    encoding took.
    """

    size: str
    requests: int
    wall_p50_ms: float
    drawing_p50_ms: float
    overhead_p50_ms: float
    overhead_p95_ms: float


def measure(folder: Path) -> tuple[StartUp, list[Overhead]]:
    """The embedded model: start it once so that the environment is warm, and measure the second start.

    Args:
        folder: an empty one, for the model store and the log.
    """
    with serve(folder) as server:
        server.wait_for("healthy")
    with serve(folder) as server:
        http_s = server.wait_for()
        ready_s = server.wait_for("healthy")
        with server.client() as client:
            _draw(client, _FIRST_PICTURE)
            first_picture_s = time.monotonic() - server.started_at
            overheads = [_overhead(client, size) for size in SIZES]
        return StartUp(http_s, ready_s, first_picture_s, _said(server)), overheads


def _overhead(client: httpx.Client, size: str) -> Overhead:
    rows = np.array([_lone_request(client, size, number) for number in range(_UNCOUNTED + _COUNT)])
    wall, drawing = rows[_UNCOUNTED:].T * 1000
    overhead = wall - drawing
    return Overhead(
        size,
        _COUNT,
        float(np.median(wall)),
        float(np.median(drawing)),
        float(np.median(overhead)),
        float(np.percentile(overhead, 95)),
    )


def _lone_request(client: httpx.Client, size: str, number: int) -> tuple[float, float]:
    """Seconds on this side's clock, and those of them that went into drawing and encoding."""
    body = {
        # Each has its own, so that remembered prompts help nobody.
        "prompt": f"picture {number}",
        "size": size,
        "num_inference_steps": _STEPS,
        "seed": number,
        "response_format": "b64_json",
    }
    started = time.perf_counter()
    response = _draw(client, body)
    wall_s = time.perf_counter() - started
    timing = response.headers["server-timing"]
    return wall_s, sum(float(dur) for dur in re.findall(r"dur=([0-9.]+)", timing)) / 1000


def _draw(client: httpx.Client, body: dict[str, Any]) -> httpx.Response:
    response = client.post(GENERATIONS, json=body)
    if response.status_code != 200:
        raise HyperGenError(f"The server answered {response.status_code}: {response.text[:300]}")
    return response


def _said(server: Server) -> str:
    """The line that `hypergen serve` prints when it is ready."""
    return next((line for line in server.log().splitlines() if line.startswith("Ready after")), "")
