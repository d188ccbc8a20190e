"""LoRAs over HTTP: by name, by path, several at once, and damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from hypergen.images.encoding import METADATA_KEY
from tests.support.http_client import GENERATIONS, QUICK, assert_error, generate, generate_image

SEEDED = {"seed": 3, "response_format": "b64_json"}


def _file(client: httpx.Client, **fields: object) -> str:
    return generate(client, **SEEDED, **fields)["data"][0]["b64_json"]


def test_a_name_a_path_and_an_object_give_the_same_bytes(client: httpx.Client, lora_folder: Path) -> None:
    base = _file(client)
    styled = _file(client, lora_path="style", lora_scale=0.5)
    assert styled != base
    assert _file(client, lora_path=str(lora_folder / "style.safetensors"), lora_scale=0.5) == styled
    assert _file(client, loras={"style": 0.5}) == styled
    assert _file(client, lora_path="style", lora_scale=0) == base
    assert _file(client, loras={}) == base


def test_the_metadata_of_an_image_has_its_loras(client: httpx.Client) -> None:
    image = generate_image(client, lora_path="style", lora_scale=0.5)
    metadata = json.loads(image.info[METADATA_KEY])
    assert metadata["loras"] == {"style": 0.5}


@pytest.mark.parametrize("fields", [{"lora_path": "broken"}, {"loras": {"broken": 1, "style": 1}}])
def test_a_damaged_lora_is_rejected_with_its_param(client: httpx.Client, fields: dict[str, object]) -> None:
    base = _file(client)
    for _ in range(2):
        response = client.post(GENERATIONS, json={**QUICK, **fields})
        assert_error(response, 400, param=next(iter(fields)))
        assert "'broken' is damaged" in response.text
    assert _file(client) == base
