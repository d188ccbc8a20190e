"""Generation from input images over HTTP: edits, variations and Hyperbolic's `image`."""

from __future__ import annotations

import base64
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.api.test_edits import EDITS, VARIATIONS
from tests.support.image_files import as_base64, as_data_url, as_file, gradient
from tests.support.live_server import LiveServer

INPUT_IMAGE = as_file(gradient(128, 128))
FIELDS = {"prompt": "a red circle", "seed": 3, "num_inference_steps": 4, "response_format": "b64_json"}


def half_mask() -> bytes:
    """A mask whose left half is generated."""
    mask = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 64, 128))
    return as_file(mask)


def items(response: httpx.Response) -> list[bytes]:
    assert response.status_code == 200, response.text
    return [base64.b64decode(item["b64_json"]) for item in response.json()["data"]]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(data)).convert("RGB"), int)


def edit(client: httpx.Client, **fields: Any) -> bytes:
    images = [{"image_url": as_data_url(INPUT_IMAGE)}]
    return items(client.post(EDITS, json={**FIELDS, "images": images, **fields}))[0]


def test_the_form_and_json_generate_the_same_bytes(client: httpx.Client) -> None:
    files = {"image": ("upload", INPUT_IMAGE), "mask": ("upload", half_mask())}
    data = {name: str(value) for name, value in FIELDS.items()}
    from_form = items(client.post(EDITS, data=data, files=files))
    assert from_form == [edit(client, mask={"image_url": as_data_url(half_mask())})]


def test_strength_0_returns_the_input_image_and_more_changes_it(client: httpx.Client) -> None:
    results = [pixels(edit(client, strength=strength)) for strength in (0, 0.5, 1)]
    before = np.asarray(gradient(128, 128), int)
    changes = [np.abs(result - before).mean() for result in results]
    assert changes[0] < 1
    assert min(changes[1:]) > 4  # with random weights, more strength is not always more change
    assert not np.array_equal(results[1], results[2])


def test_the_kept_region_of_a_mask_is_unchanged(client: httpx.Client) -> None:
    result = pixels(edit(client, mask={"image_url": as_data_url(half_mask())}))
    before = np.asarray(gradient(128, 128), int)
    assert np.abs(result - before)[:, 72:].mean() < 4
    assert np.abs(result - before)[:, :56].mean() > 4


def test_the_size_is_the_requested_one_or_that_of_the_input_image(client: httpx.Client) -> None:
    images = [{"image_url": as_data_url(as_file(gradient(101, 79)))}]
    assert pixels(edit(client, images=images)).shape == (72, 96, 3)
    assert pixels(edit(client, images=images, size="64x128")).shape == (128, 64, 3)


def test_each_image_of_an_edit_has_its_own_seed(client: httpx.Client) -> None:
    images = [{"image_url": as_data_url(INPUT_IMAGE)}]
    response = client.post(EDITS, json={**FIELDS, "images": images, "n": 2})
    assert [item["seed"] for item in response.json()["data"]] == [3, 4]
    assert items(response)[1] == edit(client, seed=4)
    tokens = response.json()["usage"]["input_tokens_details"]
    assert tokens["image_tokens"] == 64


def test_both_dialects_generate_the_same_file_from_an_input_image(client: httpx.Client) -> None:
    body = {
        "model_name": "SD1.5",
        "prompt": "a red circle",
        "seed": 3,
        "steps": 4,
        "width": 128,
        "height": 128,
        "image": as_base64(INPUT_IMAGE),
        "strength": 0.5,
    }
    result = client.post("/v1/image/generation", json=body).json()
    assert base64.b64decode(result["images"][0]["image"]) == edit(client, strength=0.5)


def test_health_responds_while_large_images_are_decoded(client: httpx.Client) -> None:
    large = as_data_url(as_file(Image.new("RGB", (6000, 6000), "red")))
    body = {**FIELDS, "images": [{"image_url": large}], "size": "64x64", "num_inference_steps": 1}
    seconds: list[float] = []
    with ThreadPoolExecutor(4) as pool:
        responses = [pool.submit(client.post, EDITS, json=body) for _ in range(4)]
        while not all(each.done() for each in responses):
            started = time.perf_counter()
            client.get("/health")
            seconds.append(time.perf_counter() - started)
    assert {each.result().status_code for each in responses} == {200}
    # Decoding takes half a second each. On the event loop, most /health requests would be late. On a busy
    # machine a few may be late for other reasons.
    assert sorted(seconds)[int(len(seconds) * 0.9)] < 0.3


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # variations, in the client
def test_the_official_client_edits_and_varies(server: LiveServer, client: httpx.Client) -> None:
    extra = {"seed": 3, "num_inference_steps": 4}
    with server.openai() as official:
        edited = official.images.edit(
            image=[INPUT_IMAGE], mask=half_mask(), prompt="a red circle", n=1, extra_body=extra
        )
        varied = official.images.create_variation(image=INPUT_IMAGE, n=2, extra_body=extra)
    assert edited.data
    assert varied.data
    assert base64.b64decode(edited.data[0].b64_json or "") == edit(
        client, mask={"image_url": as_data_url(half_mask())}
    )
    assert len(varied.data) == 2


def test_a_variation_needs_no_prompt(client: httpx.Client) -> None:
    response = client.post(VARIATIONS, data={"num_inference_steps": "2"}, files={"image": ("a", INPUT_IMAGE)})
    assert response.status_code == 200, response.text
