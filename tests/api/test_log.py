"""The access log."""

from __future__ import annotations

import re
import time

import httpx

from tests.support.http_client import assert_error, generate
from tests.support.live_server import LiveServer


def logged(server: LiveServer, request_id: str) -> str:
    """The log line of a request, which is written after the response."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        lines = [line for line in server.log().split("\n") if request_id in line]
        if lines:
            (line,) = lines
            return line
        time.sleep(0.02)
    raise AssertionError(f"No log line has {request_id}:\n{server.log()}")


def test_every_request_is_one_log_line(server: LiveServer, client: httpx.Client) -> None:
    for path, status in (("/v1/models", 200), ("/nothing", 404), ("/schema.json", 200)):
        response = client.get(path)
        line = logged(server, response.headers["x-request-id"])
        assert re.search(rf"GET {path} {status} \d+ ms req_\w+", line)


def test_probes_are_not_logged(server: LiveServer, client: httpx.Client) -> None:
    ids = [client.get(path).headers["x-request-id"] for path in ("/health", "/livez")]
    logged(server, client.get("/v1/models").headers["x-request-id"])
    assert not [request_id for request_id in ids if request_id in server.log()]


def test_a_path_cannot_forge_a_log_line(server: LiveServer, client: httpx.Client) -> None:
    hostile = "/x%0d%0a2026-11-20 FORGED%1b[31m%00%08%c2%85%e2%80%a8%5cn"
    response = client.get(hostile)
    assert_error(response, 404)
    line = logged(server, response.headers["x-request-id"])
    assert r"GET /x\r\n2026-11-20 FORGED\x1b[31m\x00\x08\x85\u2028\\n 404" in line
    assert line.isprintable()
    assert not [each for each in server.log().splitlines() if each.startswith("2026-11-20 FORGED")]
    assert "\x1b[31m" not in server.log()


def test_a_long_path_is_truncated(server: LiveServer, client: httpx.Client) -> None:
    response = client.get("/" + "a" * 5000)
    assert len(logged(server, response.headers["x-request-id"])) < 400


def test_prompts_and_queries_are_not_logged(server: LiveServer, client: httpx.Client) -> None:
    generate(client, prompt="a very private prompt", negative_prompt="another private prompt")
    client.post("/v1/images/generations", json={"prompt": "a third private prompt", "n": 99})
    client.get("/v1/models", params={"api_key": "private"})
    assert "private" not in server.log()
