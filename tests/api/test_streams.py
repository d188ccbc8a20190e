"""Streams: previews during generation, then the same image as without a stream."""

from __future__ import annotations

import base64
import json
import time
from io import BytesIO
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from tests.support.image_files import as_data_url, as_file, gradient
from tests.support.live_server import LiveServer

GENERATIONS = "/v1/images/generations"
BODY: dict[str, Any] = {
    "prompt": "a",
    "size": "96x64",
    "seed": 3,
    "num_inference_steps": 8,
    "response_format": "b64_json",
}
COMMON_FIELDS = {"type", "b64_json", "created_at", "size", "quality", "background", "output_format"}


def events_of(client: httpx.Client, path: str, body: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Names and data of all events, in order."""
    with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-request-id"]
        text = "".join(response.iter_text())
    blocks = [block.split("\n") for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(len(block) == 2 for block in blocks)
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def decode(data: dict[str, Any]) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(data["b64_json"])))


@pytest.mark.parametrize("previews", [0, 1, 3])
def test_previews_come_first_and_the_image_equals_that_without_a_stream(
    client: httpx.Client, previews: int
) -> None:
    events = events_of(client, GENERATIONS, {**BODY, "stream": True, "partial_images": previews})
    names = [name for name, _ in events]
    assert names == ["image_generation.partial_image"] * previews + ["image_generation.completed"]
    assert all(data["type"] == name and data.keys() > COMMON_FIELDS for name, data in events)
    assert [data["partial_image_index"] for _, data in events[:-1]] == list(range(previews))
    plain = client.post(GENERATIONS, json=BODY).json()
    last = events[-1][1]
    assert last["b64_json"] == plain["data"][0]["b64_json"]
    assert last["usage"] == plain["usage"]
    assert last["seed"] == 3
    for _, data in events[:-1]:
        assert decode(data).size == (96, 64)
        assert decode(data).format == "PNG"
        assert data["b64_json"] != last["b64_json"]


def test_each_image_has_its_own_events(client: httpx.Client) -> None:
    events = events_of(client, GENERATIONS, {**BODY, "stream": True, "partial_images": 1, "n": 2})
    completed = {data["index"]: data for name, data in events if name.endswith("completed")}
    previews = [data["index"] for name, data in events if name.endswith("partial_image")]
    assert sorted(previews) == [0, 1]
    plain = client.post(GENERATIONS, json={**BODY, "n": 2}).json()["data"]
    assert [completed[index]["b64_json"] for index in (0, 1)] == [item["b64_json"] for item in plain]
    assert [completed[index]["seed"] for index in (0, 1)] == [3, 4]


def test_edits_stream_image_edit_events(client: httpx.Client) -> None:
    images = [{"image_url": as_data_url(as_file(gradient(96, 64)))}]
    body = {**BODY, "images": images, "stream": True, "partial_images": 1, "output_format": "jpeg"}
    events = events_of(client, "/v1/images/edits", body)
    assert [name for name, _ in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert all(decode(data).format == "JPEG" for _, data in events)


def test_the_official_client_reads_the_stream(server: LiveServer) -> None:
    stream = server.openai().images.generate(
        prompt="a", size="96x64", stream=True, partial_images=2, extra_body={"num_inference_steps": 8}
    )
    types = [event.type for event in stream]
    assert types == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]


def test_an_error_before_the_first_event_has_its_own_status(server: LiveServer) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        server.openai().images.generate(prompt=" ", stream=True)
    assert raised.value.param == "prompt"


@pytest.mark.parametrize("path", ["/v1/images/jobs"])
def test_jobs_reject_stream(client: httpx.Client, path: str) -> None:
    response = client.post(path, json={**BODY, "stream": True})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "stream"


def test_a_disconnect_cancels_a_stream(server: LiveServer) -> None:
    body = {**BODY, "num_inference_steps": 150, "size": "256x256", "n": 10, "stream": True}
    with (
        httpx.Client(base_url=server.url, timeout=60) as client,
        client.stream("POST", GENERATIONS, json=body) as response,
    ):
        assert response.status_code == 200
        assert server.health()["running"] == 1
    until = time.monotonic() + 20
    while server.health()["queue_size"]:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_client_can_ask_for_progress(client: httpx.Client) -> None:
    body = {**BODY, "stream": True, "stream_progress": True, "partial_images": 1, "n": 2}
    events = events_of(client, GENERATIONS, body)
    progress = [data for name, data in events if name == "image_generation.progress"]
    assert all(data["type"] == "image_generation.progress" for data in progress)
    assert progress[0]["position"] >= 0
    steps = [data["step"] for data in progress if "step" in data]
    assert steps == sorted(steps)
    assert progress[-1] == {**progress[-1], "step": 16, "steps": 16, "expected_s": 0}
    plain = client.post(GENERATIONS, json={**BODY, "n": 2}).json()["data"]
    images = {data["index"]: data for name, data in events if name.endswith("completed")}
    assert [images[index]["b64_json"] for index in (0, 1)] == [item["b64_json"] for item in plain]


def test_an_error_after_the_start_of_a_stream_names_the_field(client: httpx.Client) -> None:
    body = {**BODY, "stream": True, "stream_progress": True, "lora_path": "broken"}
    name, data = events_of(client, GENERATIONS, body)[-1]
    assert name == "error"
    assert data["error"]["param"] == "lora_path"
