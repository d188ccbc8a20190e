"""BentoML's batchable API, POST /generate."""

from __future__ import annotations

import base64
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support.http_client import JSON, QUICK, SLOW, assert_error, generate_files


def generate(client: httpx.Client, *items: dict[str, Any]) -> list[dict[str, Any]]:
    response = client.post("/generate", json={"items": items})
    assert response.status_code == 200, response.text
    return response.json()


def test_items_generate_the_same_bytes_as_the_openai_route(client: httpx.Client) -> None:
    (result,) = generate(client, {**QUICK, "seed": 6, "n": 2, "output_format": "webp", "style": None})
    assert result["status"] == 200
    assert [image["seed"] for image in result["images"]] == [6, 7]
    data = [base64.b64decode(image["b64_json"]) for image in result["images"]]
    assert data == generate_files(client, seed=6, n=2, output_format="webp")


def test_items_fail_independently(client: httpx.Client) -> None:
    good, bad, also_bad = generate(client, QUICK, {**QUICK, "n": 99}, {})
    assert (good["status"], len(good["images"])) == (200, 1)
    assert (bad["status"], bad["error"]["param"]) == (400, "n")
    assert set(bad["error"]) == {"message", "type", "param", "code"}
    assert (also_bad["status"], also_bad["error"]["param"]) == (400, "prompt")


def test_a_small_call_does_not_wait_for_a_large_one(client: httpx.Client) -> None:
    """Both arrive at the same time; the stock dispatcher would put them into one batch."""
    large = {**QUICK, "num_inference_steps": 60, "n": 4}
    ended: list[str] = []

    def call(name: str, item: dict[str, Any]) -> None:
        assert generate(client, item)[0]["status"] == 200
        ended.append(name)

    with ThreadPoolExecutor(2) as calls:
        for _ in range(3):
            for future in [calls.submit(call, "large", large), calls.submit(call, "small", QUICK)]:
                future.result()
    assert ended == ["small", "large"] * 3


def test_a_call_has_at_most_64_items(client: httpx.Client) -> None:
    item = {**QUICK, "n": 0}
    assert [result["status"] for result in generate(client, *[item] * 64)] == [400] * 64
    response = client.post("/generate", json={"items": [item] * 65})
    assert "items" in assert_error(response, 400)


def test_no_items_give_no_results(client: httpx.Client) -> None:
    assert generate(client) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "items: Field required."),
        (b"{}", "items: Field required."),
        (b'{"items": "x"}', "items: Input should be a valid array."),
        (b'{"items": [1]}', "items.0: Input should be an object."),
        (b"[" * 100_000, "The body: Invalid JSON"),
        (b"{", "The body: Invalid JSON"),
        (b'{"items": [{"prompt": "\\ud800"}]}', "The body: Invalid JSON"),
        (b"\xff", "The body: Invalid JSON"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_an_invalid_body_gets_the_error_body(client: httpx.Client, body: bytes, message: str) -> None:
    assert assert_error(client.post("/generate", content=body, headers=JSON), 400).startswith(message)


@pytest.mark.parametrize(
    "media_type", ["application/vnd.bentoml+pickle", "multipart/form-data", "text/plain", ""]
)
def test_only_json_is_accepted(client: httpx.Client, media_type: str) -> None:
    response = client.post("/generate", content=b'{"items": []}', headers={"Content-Type": media_type})
    assert_error(response, 415, code="unsupported_media_type")


def test_a_disconnect_cancels_the_items_of_a_client(client: httpx.Client) -> None:
    with pytest.raises(httpx.ReadTimeout):
        client.post("/generate", json={"items": [SLOW, SLOW]}, timeout=1)
    until = time.monotonic() + 10
    while (size := client.get("/health").json()["queue_size"]) and time.monotonic() < until:
        time.sleep(0.05)
    assert size == 0
    assert generate(client, QUICK)[0]["status"] == 200
