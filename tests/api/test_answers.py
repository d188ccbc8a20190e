"""The response body and headers of generations."""

from __future__ import annotations

import base64
import re
import time
from typing import Any

import httpx
import pytest

from tests.api.conftest import TightServer
from tests.support.http_client import GENERATIONS, QUICK, generate


def test_a_response_describes_the_images(client: httpx.Client) -> None:
    before = int(time.time())
    body = generate(client, n=2, size="128x64", seed=3)
    assert set(body) == {"created", "data", "size", "quality", "background", "output_format", "usage"}
    assert type(body["created"]) is int
    assert before <= body["created"] <= time.time()
    assert body["size"] == "128x64"
    assert body["quality"] == "medium"
    assert body["background"] == "opaque"
    assert body["output_format"] == "png"
    assert [item["revised_prompt"] for item in body["data"]] == [QUICK["prompt"]] * 2


def test_usage_counts_tokens(client: httpx.Client) -> None:
    usage = generate(client, n=2, prompt="abc")["usage"]
    assert usage == {
        "input_tokens": 3,  # the small model's tokenizer has one token per byte
        "output_tokens": 2 * 8 * 8,
        "total_tokens": 3 + 128,
        "input_tokens_details": {"text_tokens": 3, "image_tokens": 0},
        "output_tokens_details": {"text_tokens": 0, "image_tokens": 128},
    }


@pytest.mark.parametrize(
    ("requested", "returned"),
    [
        (None, "medium"),
        ("auto", "medium"),
        ("standard", "medium"),
        ("hd", "high"),
        ("low", "low"),
        ("medium", "medium"),
        ("high", "high"),
        ("xhigh", "xhigh"),
        ("max", "max"),
    ],
)
def test_quality_is_mapped_to_openais_values_and_changes_no_pixel(
    client: httpx.Client, requested: str | None, returned: str
) -> None:
    body = generate(client, seed=1, quality=requested)
    assert body["quality"] == returned
    assert body["data"][0]["b64_json"] == generate(client, seed=1)["data"][0]["b64_json"]


@pytest.mark.parametrize(
    ("fields", "keys"),
    [
        ({}, {"b64_json", "url"}),
        ({"response_format": None}, {"b64_json", "url"}),
        ({"response_format": "b64_json"}, {"b64_json"}),
        ({"response_format": "url"}, {"url"}),
    ],
)
def test_only_the_requested_response_formats_are_present(
    client: httpx.Client, fields: dict[str, Any], keys: set[str]
) -> None:
    body = generate(client, n=2, **fields)
    for item in body["data"]:
        assert set(item) & {"b64_json", "url"} == keys
    assert None not in [value for item in body["data"] for value in item.values()]
    assert None not in body.values()


def test_url_and_base64_have_the_same_bytes(client: httpx.Client) -> None:
    for item in generate(client, n=3)["data"]:
        assert httpx.get(item["url"]).content == base64.b64decode(item["b64_json"], validate=True)


def test_image_urls_start_with_the_public_url(tight: TightServer) -> None:
    url = generate(tight.client)["data"][0]["url"]
    assert url.startswith("https://public.example/hypergen/v1/images/files/")


def test_responses_have_the_processing_time(client: httpx.Client) -> None:
    started = time.monotonic()
    response = client.post(GENERATIONS, json=QUICK)
    assert 1 <= int(response.headers["openai-processing-ms"]) <= (time.monotonic() - started) * 1000 + 1


def test_responses_have_the_engine_and_encoding_times(client: httpx.Client) -> None:
    started = time.monotonic()
    response = client.post(GENERATIONS, json={**QUICK, "n": 3, "output_format": "webp"})
    wall_ms = (time.monotonic() - started) * 1000
    timing = re.fullmatch(r"engine;dur=([0-9.]+), encode;dur=([0-9.]+)", response.headers["server-timing"])
    assert timing is not None
    engine_ms, encode_ms = map(float, timing.groups())
    assert engine_ms > 0
    assert encode_ms > 0
    assert engine_ms + encode_ms < wall_ms + 1


def test_every_response_has_a_unique_request_id(client: httpx.Client) -> None:
    responses = [client.get("/health") for _ in range(20)]
    responses += [client.get("/nothing"), client.post(GENERATIONS), client.head("/v1/models")]
    responses += [client.post(GENERATIONS, json=QUICK), client.get("/schema.json"), client.get("/livez")]
    responses += [client.get("/health", headers={"x-request-id": "mine"})]
    ids = {response.headers["x-request-id"] for response in responses}
    assert len(ids) == len(responses)
    assert all(request_id.startswith("req_") for request_id in ids)


def test_responses_do_not_reveal_the_server_software(client: httpx.Client) -> None:
    for response in (
        client.get("/health"),
        client.get("/schema.json"),
        client.get("/livez"),
        client.get("/x"),
    ):
        assert "server" not in response.headers
        assert not [name for name in response.headers if "bento" in name]
