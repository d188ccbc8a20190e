"""Errors without generation: unknown paths, wrong methods, and exceptions of the official client."""

from __future__ import annotations

import httpx
import openai
import pytest

from tests.support.http_client import GENERATIONS, assert_error
from tests.support.live_server import LiveServer


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize(
    "path",
    ["/nothing", "/v1", "/v1/images/generations/", "//v1/models", "/V1/models", "/%00", "/%ff", "/é"],
)
def test_unknown_paths_are_not_found(client: httpx.Client, method: str, path: str) -> None:
    assert_error(client.request(method, path), 404, param=None, code="not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", GENERATIONS, {"POST"}),
        ("PUT", GENERATIONS, {"POST"}),
        ("DELETE", "/v1/models", {"GET"}),
        ("DELETE", "/v1/models/some/model", {"GET"}),
        ("POST", "/health", {"GET"}),
        ("POST", "/openapi.json", {"GET", "HEAD"}),
        # BentoML's own:
        ("GET", "/generate", {"POST"}),
        ("POST", "/livez", {"GET", "HEAD"}),
        ("PUT", "/schema.json", {"GET", "HEAD"}),
    ],
)
def test_a_wrong_method_gets_405_with_the_allowed_methods(
    client: httpx.Client, method: str, path: str, allowed: set[str]
) -> None:
    response = client.request(method, path)
    assert_error(response, 405, code="method_not_allowed")
    assert set(response.headers["allow"].split(", ")) == allowed


def test_unknown_methods_are_rejected(client: httpx.Client) -> None:
    for path in ("/v1/models", "/nothing"):
        assert_error(client.request("FOO", path), 405)


def test_head_has_no_body(client: httpx.Client) -> None:
    response = client.head(GENERATIONS)
    assert (response.status_code, response.content) == (405, b"")


def test_the_official_client_raises_bad_request(server: LiveServer) -> None:
    with server.openai() as client, pytest.raises(openai.BadRequestError) as raised:
        client.images.generate(prompt="a", n=11)
    assert raised.value.param == "n"
    assert raised.value.type == "invalid_request_error"
    assert raised.value.code == "invalid_value"
    assert raised.value.request_id
    assert "'n' should be less than or equal to 10" in str(raised.value)


def test_the_official_client_raises_authentication_error(keyed_server: LiveServer) -> None:
    with (
        openai.OpenAI(base_url=f"{keyed_server.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as raised,
    ):
        client.images.generate(prompt="a")
    assert raised.value.code == "invalid_api_key"


def test_the_official_client_raises_not_found(server: LiveServer) -> None:
    with server.openai() as client:
        with pytest.raises(openai.NotFoundError) as raised:
            client.models.retrieve("some/model")
        assert raised.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": "a"}])


@pytest.mark.parametrize("method", ["OPTIONS", "TRACE", "QUERY", "PUT"])
def test_the_allow_header_has_all_methods_of_a_path(client: httpx.Client, method: str) -> None:
    assert client.request(method, "/v1/images/jobs/job_1").headers["allow"] == "DELETE, GET"
    assert client.request(method, "/generate").headers["allow"] == "POST"
