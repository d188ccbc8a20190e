"""The same seed gives the same bytes over HTTP, whatever else the server draws meanwhile."""

from __future__ import annotations

import base64
import random
import threading
from typing import Any

import httpx
import pytest

from tests.support.live_server import LiveServer

SAMPLERS = ["ddim", "euler_a", "dpmpp_2m_sde", "heun", "unipc", "lcm"]


def draw(server: LiveServer, body: dict[str, Any]) -> tuple[bytes, int]:
    """The picture, and how many of its forward passes it shared with other requests."""
    url = f"{server.url}/v1/images/generations"
    answer = httpx.post(url, json={**body, "response_format": "b64_json"}, timeout=120).raise_for_status()
    shared = int(answer.headers["x-hypergen-shared-forwards"])
    return base64.b64decode(answer.json()["data"][0]["b64_json"]), shared


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seeded_picture_is_byte_equal_alone_and_in_a_crowd(server: LiveServer, sampler: str) -> None:
    body = {"prompt": "a cat", "size": "64x64", "seed": 11, "num_inference_steps": 8, "sampler": sampler}
    alone, shared = draw(server, body)
    assert shared == 0
    rng = random.Random(sampler)
    leave = threading.Event()

    def crowd() -> None:
        while not leave.is_set():
            draw(
                server,
                {
                    "prompt": rng.choice(["a dog", "two birds", "x"]),
                    "size": "64x64",
                    "num_inference_steps": rng.randint(2, 12),
                    "guidance_scale": rng.choice([1, 3, 9.5]),
                    "sampler": rng.choice(SAMPLERS),
                },
            )

    neighbours = [threading.Thread(target=crowd) for _ in range(4)]
    for neighbour in neighbours:
        neighbour.start()
    try:
        crowded = [draw(server, body) for _ in range(3)]
    finally:
        leave.set()
        for neighbour in neighbours:
            neighbour.join()
    assert [picture for picture, _ in crowded] == [alone] * 3
    assert any(shared for _, shared in crowded)
