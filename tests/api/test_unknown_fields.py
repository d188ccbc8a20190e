"""Fields that a route does not know: named in a header, or refused with --strict."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.http_client import GENERATIONS, QUICK, assert_error
from tests.support.live_server import LiveServer, start_server

_HYPERBOLIC = {"model_name": "tiny", "prompt": "a red circle", "steps": 1}


def _ignored(client: httpx.Client, path: str, body: dict[str, Any]) -> str | None:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.headers.get("x-hypergen-ignored")


def test_ignored_fields_are_named(client: httpx.Client) -> None:
    assert _ignored(client, GENERATIONS, QUICK) is None
    # Fields of OpenAI's API that have no effect here are known.
    assert _ignored(client, GENERATIONS, {**QUICK, "user": "u", "quality": "high"}) is None
    assert _ignored(client, GENERATIONS, {**QUICK, "steps": 3, "cfg": 1, "absent": None}) == "cfg, steps"
    assert _ignored(client, "/v1/image/generation", {**_HYPERBOLIC, "size": "64x64"}) == "size"


def test_a_name_cannot_break_the_header(client: httpx.Client) -> None:
    body = {**QUICK, "a\r\nSet-Cookie: x": 1, "é": 1, **{f"z{number:03}": 1 for number in range(100)}}
    value = _ignored(client, GENERATIONS, body)
    assert value is not None
    assert value.startswith("a%0D%0ASet-Cookie: x, z000, ")
    assert len(value.split(", ")) == 20


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("strict")
    with start_server(folder, str(sd_folder), "--device", "cpu", "--dtype", "float32", "--strict") as server:
        yield server


@pytest.mark.parametrize(
    ("path", "body"),
    [(GENERATIONS, QUICK), ("/v1/images/jobs", QUICK), ("/v1/image/generation", _HYPERBOLIC)],
)
def test_a_strict_server_refuses_unknown_fields(strict: LiveServer, path: str, body: dict[str, Any]) -> None:
    with httpx.Client(base_url=strict.url, timeout=60) as client:
        refused = client.post(path, json={**body, "cfg": 1})
        assert (
            assert_error(refused, 400, param="cfg", code="unknown_parameter") == "Unknown parameter: 'cfg'."
        )
        assert client.post(path, json=body).status_code in (200, 202)
