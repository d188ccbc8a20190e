"""A server with a content filter: refused images are a 400 on every route."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.api.test_jobs import ended, submit, wait
from tests.support.http_client import GENERATIONS, QUICK
from tests.support.live_server import LiveServer, start_server

ROOT = Path(__file__).parents[2]
REFUSED = {**QUICK, "prompt": "a refused cat"}


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Iterator[LiveServer]:
    arguments = (str(sd_folder), "--device", "cpu", "--dtype", "float32")
    arguments += ("--safety-checker", "tests.support.content_filter:refuse_marked")
    with start_server(
        tmp_path_factory.mktemp("filtered"), *arguments, environment={"PYTHONPATH": str(ROOT)}
    ) as server:
        yield server


@pytest.fixture
def client(filtered: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=filtered.url, timeout=60) as client:
        yield client


def assert_refused(error: dict[str, Any]) -> None:
    assert error["code"] == "content_policy_violation"
    assert error["type"] == "invalid_request_error"
    assert "content filter" in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (GENERATIONS, REFUSED),
        (GENERATIONS, {**REFUSED, "n": 2, "response_format": "url"}),
        ("/v1/image/generation", {"model_name": "x", "prompt": "a refused cat", "steps": 1}),
    ],
)
def test_a_refused_image_is_a_400_in_each_dialect(
    client: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    response = client.post(path, json=body)
    assert response.status_code == 400
    assert_refused(response.json()["error"])
    assert client.post(path, json={**body, "prompt": "a cat"}).status_code == 200


def test_openais_client_raises_a_bad_request(filtered: LiveServer) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        filtered.openai().images.generate(prompt="a refused cat", extra_body={"num_inference_steps": 1})
    assert raised.value.code == "content_policy_violation"


def test_a_stream_ends_with_the_error_and_has_no_previews(client: httpx.Client) -> None:
    body = {**REFUSED, "num_inference_steps": 4, "stream": True, "partial_images": 2}
    response = client.post(GENERATIONS, json=body)
    data = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert_refused(data[-1]["error"])
    assert len(data) == 1


def test_a_job_fails_with_the_error(client: httpx.Client) -> None:
    job = wait(client, submit(client, **REFUSED), ended)[-1]
    assert job["status"] == "failed"
    assert_refused(job["error"])
