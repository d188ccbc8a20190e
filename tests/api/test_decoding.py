"""Image files: seeds, formats and the settings in their metadata."""

from __future__ import annotations

import json
from io import BytesIO
from typing import Any

import httpx
import pytest
from PIL import ExifTags, Image

from tests.api.conftest import TightServer
from tests.support.http_client import QUICK, generate, generate_files

FORMATS = ["png", "jpeg", "webp"]


def settings_in(data: bytes) -> dict[str, Any] | None:
    """The settings in the metadata of a file."""
    image = Image.open(BytesIO(data))
    text = image.info.get("hypergen") if image.format == "PNG" else None
    text = text or image.getexif().get(ExifTags.Base.ImageDescription)
    return None if text is None else json.loads(text)


@pytest.mark.parametrize("output_format", FORMATS)
def test_each_image_of_a_request_equals_the_single_image_with_its_seed(
    client: httpx.Client, output_format: str
) -> None:
    fields = {"output_format": output_format, "num_inference_steps": 3}
    body = generate(client, n=4, seed=100, **fields)
    assert [item["seed"] for item in body["data"]] == [100, 101, 102, 103]
    together = [item["b64_json"] for item in body["data"]]
    alone = [generate(client, seed=100 + index, **fields)["data"][0]["b64_json"] for index in range(4)]
    assert together == alone
    assert len(set(together)) == 4


@pytest.mark.parametrize("sampler", [None, "euler_a", "dpmpp_2m_sde"])
def test_the_same_seed_gives_the_same_bytes(client: httpx.Client, sampler: str | None) -> None:
    fields = {"seed": 2**40, "sampler": sampler, "num_inference_steps": 3}
    assert generate_files(client, **fields) == generate_files(client, **fields)


def test_seeds_of_all_images_are_within_the_range(client: httpx.Client) -> None:
    assert [item["seed"] for item in generate(client, n=2, seed=2**63 - 2)["data"]] == [2**63 - 2, 2**63 - 1]
    response = client.post("/v1/images/generations", json={"prompt": "a", "n": 2, "seed": 2**63 - 1})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "seed"


def test_without_a_seed_images_differ_and_the_response_has_their_seeds(client: httpx.Client) -> None:
    items = [generate(client)["data"][0] for _ in range(3)]
    assert len({item["b64_json"] for item in items}) == 3
    for item in items:
        assert 0 <= item["seed"] < 2**53  # a JavaScript client reads it back exactly
        assert generate(client, seed=item["seed"])["data"][0]["b64_json"] == item["b64_json"]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"prompt": "a blue square"},
        {"negative_prompt": "red"},
        {"guidance_scale": 1},
        {"num_inference_steps": 4},
        {"sampler": "euler"},
    ],
    ids=str,
)
def test_settings_change_the_pixels(client: httpx.Client, change: dict[str, Any]) -> None:
    fields = {"seed": 7, "num_inference_steps": 3}
    assert pixels(generate_files(client, **fields)[0]) != pixels(
        generate_files(client, **{**fields, **change})[0]
    )


@pytest.mark.parametrize(
    "change", [{"style": "vivid"}, {"user": "u"}, {"model": "m"}, {"negative_prompt": ""}]
)
def test_fields_without_effect_change_no_byte(client: httpx.Client, change: dict[str, Any]) -> None:
    assert generate_files(client, seed=7) == generate_files(client, seed=7, **change)


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_file_has_the_requested_format(client: httpx.Client, output_format: str) -> None:
    data = generate_files(client, output_format=output_format)[0]
    assert Image.open(BytesIO(data)).format == output_format.upper()
    assert generate(client, output_format=output_format)["output_format"] == output_format


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_lower_output_compression_makes_a_smaller_file(client: httpx.Client, output_format: str) -> None:
    sizes = [
        len(generate_files(client, seed=1, output_format=output_format, output_compression=number)[0])
        for number in (0, 20, 50, 80, 95, 100)
    ]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_file_contains_its_settings(client: httpx.Client, output_format: str) -> None:
    fields = {
        "negative_prompt": "grün 🦊",
        "seed": 40,
        "guidance_scale": 3,
        "sampler": "ddim",
        "size": "72x64",
    }
    data = generate_files(client, n=2, output_format=output_format, **fields)[1]
    settings = settings_in(data)
    assert settings == {
        "model": client.get("/v1/models").json()["data"][0]["id"],
        "prompt": QUICK["prompt"],
        "negative_prompt": "grün 🦊",
        "width": 72,
        "height": 64,
        "num_inference_steps": 1,
        "guidance_scale": 3.0,
        "sampler": "ddim",
        "seed": 41,
    }


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_longest_prompts_work_with_every_format(client: httpx.Client, output_format: str) -> None:
    # A JPEG has space for at most 64 KB of settings, so here it has none.
    data = generate_files(
        client, prompt="🦊" * 32000, negative_prompt="ü" * 32000, output_format=output_format
    )[0]
    settings = settings_in(data)
    if output_format == "jpeg":
        assert settings is None
    else:
        assert settings
        assert settings["prompt"] == "🦊" * 32000


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_server_can_omit_the_settings_from_its_files(tight: TightServer, output_format: str) -> None:
    data = generate_files(tight.client, seed=1, output_format=output_format)[0]
    assert settings_in(data) is None
    assert not Image.open(BytesIO(data)).getexif()
    assert b"red circle" not in data


def test_the_settings_in_the_file_change_no_pixel(client: httpx.Client, tight: TightServer) -> None:
    with_settings, without = generate_files(client, seed=1)[0], generate_files(tight.client, seed=1)[0]
    assert with_settings != without
    assert pixels(with_settings) == pixels(without)


def pixels(data: bytes) -> bytes:
    return Image.open(BytesIO(data)).tobytes()
