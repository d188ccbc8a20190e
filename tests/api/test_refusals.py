"""Errors of a server with a full queue, an exceeded deadline, or a model that is still loading."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.api.conftest import TightServer
from tests.support.http_client import GENERATIONS, SLOW, assert_error, generate
from tests.support.live_server import LiveServer


@pytest.fixture(scope="module")
def errors(tight: TightServer) -> list[openai.APIStatusError]:
    """The errors of eight concurrent clients whose requests exceed the request timeout."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda _: _error(tight.server), range(8)))


def _error(server: LiveServer) -> openai.APIStatusError:
    with server.openai() as client, pytest.raises(openai.APIStatusError) as raised:
        client.images.generate(prompt="a", n=10, extra_body={"num_inference_steps": 150})
    return raised.value


def test_a_full_queue_gets_429_with_retry_after(errors: list[openai.APIStatusError]) -> None:
    rejected = [error for error in errors if error.status_code == 429]
    assert rejected
    for error in rejected:
        assert isinstance(error, openai.RateLimitError)
        assert (error.type, error.code) == ("rate_limit_error", "rate_limit_exceeded")
        assert 1 <= int(error.response.headers["retry-after"]) <= 60
        assert_error(error.response, 429)


def test_a_request_beyond_its_deadline_gets_504_and_should_not_be_retried(
    errors: list[openai.APIStatusError],
) -> None:
    late = [error for error in errors if error.status_code != 429]
    assert late
    for error in late:
        assert isinstance(error, openai.InternalServerError)
        assert (error.type, error.code) == ("timeout_error", "timeout")
        assert error.response.headers["x-should-retry"] == "false"
        assert_error(error.response, 504)


def test_the_official_client_does_not_retry_after_a_timeout(tight: TightServer) -> None:
    requests: list[Any] = []
    http = openai.DefaultHttpxClient(event_hooks={"request": [requests.append]})
    with (
        tight.server.openai(max_retries=2, http_client=http) as client,
        pytest.raises(openai.InternalServerError),
    ):
        client.images.generate(prompt="a", n=10, extra_body={"num_inference_steps": 150})
    assert len(requests) == 1


def test_rejected_requests_free_the_queue(tight: TightServer, errors: object) -> None:
    assert errors
    generate(tight.client)
    assert tight.client.get("/health").json()["queue_size"] == 0


def test_requests_get_503_with_retry_after_while_the_model_loads(tight: TightServer) -> None:
    response = tight.error_while_loading
    assert_error(response, 503, param=None, code="loading")
    assert response.json()["error"]["type"] == "service_unavailable_error"
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert "x-should-retry" not in response.headers  # so the official clients retry


def test_health_is_loading_while_the_model_loads(tight: TightServer) -> None:
    assert tight.health_while_loading.status_code == 503
    body = tight.health_while_loading.json()
    assert body["status"] == "loading"
    assert body["model"] == "owner/small-sd"
    assert body["queue_size"] == 0


def test_models_are_listed_while_they_load(tight: TightServer) -> None:
    assert [model["id"] for model in tight.models_while_loading.json()["data"]] == ["owner/small-sd"]


def test_invalid_requests_are_not_queued(tight: TightServer) -> None:
    for _ in range(20):
        assert_error(tight.client.post(GENERATIONS, json={**SLOW, "size": "x"}), 400, param="size")
    assert tight.client.get("/health").json()["queue_size"] == 0
