"""Requests to a test server, and checks of its responses."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from typing import Any

import httpx
from PIL import Image

from tests.support.live_server import LiveServer

GENERATIONS = "/v1/images/generations"
# One step at the small model's native size, which is probed at loading: some milliseconds.
QUICK: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 1}
# Far longer than any test waits.
SLOW: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 150, "n": 10}
JSON = {"Content-Type": "application/json"}
ANY = object()


def generate(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    """The response body of a request that must succeed."""
    response = client.post(GENERATIONS, json={**QUICK, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def generate_files(client: httpx.Client, **fields: Any) -> list[bytes]:
    """The image files of a request that must succeed."""
    body = generate(client, response_format="b64_json", **fields)
    return [base64.b64decode(item["b64_json"], validate=True) for item in body["data"]]


def generate_image(client: httpx.Client, **fields: Any) -> Image.Image:
    """The first image of a request that must succeed."""
    image = Image.open(BytesIO(generate_files(client, **fields)[0]))
    image.load()
    return image


def as_json(body: dict[str, Any]) -> bytes:
    """JSON in ASCII, because httpx refuses characters that UTF-8 cannot encode."""
    return json.dumps(body).encode()


def assert_error(response: Any, status: int, param: Any = ANY, code: Any = ANY) -> str:
    """Check status and body of an error; returns its message.

    Args:
        response: of httpx, or of the official client's HTTP client.
    """
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    body = response.json()
    assert set(body) == {"error", "detail"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert type(error["message"]) is type(error["type"]) is type(error["code"]) is str
    assert error["param"] is None or type(error["param"]) is str
    if status == 401:
        assert body["detail"] == "Invalid API key"
    else:
        assert body["detail"] == error["message"]
    assert param is ANY or error["param"] == param, body
    if status == 400 and error["param"] is not None:
        assert error["param"] in error["message"], body
    assert code is ANY or error["code"] == code, body
    return error["message"]


def client_of(server: LiveServer, **headers: str) -> httpx.Client:
    """A client with the server's API key, if it has one."""
    if server.api_key:
        headers = {"Authorization": f"Bearer {server.api_key}", **headers}
    return httpx.Client(base_url=server.url, headers=headers, timeout=120)
