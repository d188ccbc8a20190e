"""A prompt without a word that the embedded model knows: the log and the answers say what was understood."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from hypergen.api.openapi import EXAMPLE_IMAGE
from tests.playground.actions import finished, generate
from tests.playground.conftest import KEY
from tests.support.live_server import LiveServer

if TYPE_CHECKING:
    from playwright.sync_api import Page

UNDERSTOOD = "a shape on a background"
KNOWN = "an astronaut in a RED coat"
UNKNOWN = "a photo of an astronaut riding a horse, 4k"


def post(server: LiveServer, path: str, **fields: Any) -> tuple[httpx.Response, list[str]]:
    """The response, and the lines of the log that say what was understood of this request's prompt."""
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"num_inference_steps": 1, "size": "64x64", **fields}
    response = httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=60)
    assert response.status_code == 200, response.text
    request_id = response.headers["x-request-id"]
    lines = [line for line in server.log().splitlines() if request_id in line and UNDERSTOOD in line]
    return response, lines


@pytest.mark.parametrize("response_format", ["b64_json", "url"])
def test_a_generation_says_what_was_understood(playground: LiveServer, response_format: str) -> None:
    path, fields = "/v1/images/generations", {"response_format": response_format, "n": 2}
    response, lines = post(playground, path, prompt=UNKNOWN, **fields)
    assert [item["revised_prompt"] for item in response.json()["data"]] == [UNDERSTOOD] * 2
    assert len(lines) == 1
    response, lines = post(playground, path, prompt=KNOWN, **fields)
    assert [item["revised_prompt"] for item in response.json()["data"]] == [KNOWN] * 2
    assert lines == []


def test_an_edit_says_what_was_understood(playground: LiveServer) -> None:
    images = [{"image_url": f"data:image/png;base64,{EXAMPLE_IMAGE}"}]
    for prompt, revised, count in ((UNKNOWN, UNDERSTOOD, 1), (KNOWN, KNOWN, 0)):
        response, lines = post(playground, "/v1/images/edits", prompt=prompt, images=images)
        assert response.json()["data"][0]["revised_prompt"] == revised
        assert len(lines) == count


def test_the_last_event_of_a_stream_says_what_was_understood(playground: LiveServer) -> None:
    for prompt, revised in ((UNKNOWN, UNDERSTOOD), (KNOWN, None)):
        response, lines = post(playground, "/v1/images/generations", prompt=prompt, stream=True)
        data = [line for line in response.text.splitlines() if line.startswith("data: ")]
        assert json.loads(data[-1][6:]).get("revised_prompt") == revised
        assert len(lines) == (0 if revised is None else 1)


def test_the_page_says_what_was_understood(page: Page) -> None:
    expect = pytest.importorskip("playwright.sync_api").expect
    sentence = f"It understood: {UNDERSTOOD}."
    generate(page, UNKNOWN)
    expect(page.locator(".tile").get_by_text(sentence)).to_be_visible()
    finished(page).click()
    expect(page.get_by_role("dialog", name="Image").get_by_text(sentence)).to_be_visible()
    page.keyboard.press("Escape")
    generate(page, KNOWN)
    expect(finished(page)).to_have_count(2)
    expect(page.get_by_text(sentence)).to_have_count(1)
