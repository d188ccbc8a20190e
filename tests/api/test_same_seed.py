"""The same seed gives the same bytes over HTTP, alone and in a batch."""

from __future__ import annotations

import base64
import random
import threading
from typing import Any

import httpx
import pytest

from tests.support.live_server import LiveServer

SAMPLERS = ["ddim", "euler_a", "dpmpp_2m_sde", "heun", "unipc", "lcm"]


def generate(server: LiveServer, body: dict[str, Any]) -> tuple[bytes, int]:
    """The image file, and the number of forward passes that it shared with other requests."""
    url = f"{server.url}/v1/images/generations"
    response = httpx.post(url, json={**body, "response_format": "b64_json"}, timeout=120).raise_for_status()
    shared = int(response.headers["x-hypergen-shared-forwards"])
    return base64.b64decode(response.json()["data"][0]["b64_json"]), shared


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_with_a_seed_is_byte_equal_alone_and_in_a_batch(server: LiveServer, sampler: str) -> None:
    body = {"prompt": "a cat", "size": "64x64", "seed": 11, "num_inference_steps": 8, "sampler": sampler}
    alone, shared = generate(server, body)
    assert shared == 0
    rng = random.Random(sampler)
    stop = threading.Event()

    def generate_others() -> None:
        while not stop.is_set():
            generate(
                server,
                {
                    "prompt": rng.choice(["a dog", "two birds", "x"]),
                    "size": "64x64",
                    "num_inference_steps": rng.randint(2, 12),
                    "guidance_scale": rng.choice([1, 3, 9.5]),
                    "sampler": rng.choice(SAMPLERS),
                },
            )

    threads = [threading.Thread(target=generate_others) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        batched = [generate(server, body) for _ in range(3)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert [image for image, _ in batched] == [alone] * 3
    assert any(shared for _, shared in batched)
