"""Two models on a server with memory for only one: names, aliases, defaults and errors."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.support.http_client import assert_error
from tests.support.live_server import LiveServer, copy_imported, start_server

_QUICK = {"prompt": "a cat", "seed": 5, "response_format": "b64_json"}


@pytest.fixture(scope="module")
def several(
    tmp_path_factory: pytest.TempPathFactory, sd_folder: Path, v_prediction_folder: Path
) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("several")
    first, second = folder / "first.yaml", folder / "second.yaml"
    width = json.loads((v_prediction_folder / "text_encoder/config.json").read_bytes())["hidden_size"]
    save_file({"emb_params": torch.full((2, width), 0.1)}, folder / "ink.safetensors")
    first.write_text(
        f"source: {sd_folder}\nname: owner/first\naliases: [SD1.5]\n"
        "defaults: {num_inference_steps: 2, width: 64, height: 64}\n"
    )
    second.write_text(
        f"source: {v_prediction_folder}\nname: second\naliases: [SD2]\n"
        "defaults: {num_inference_steps: 3, width: 96, height: 64}\nembeddings: {inkstyle: ink.safetensors}\n"
    )
    options = ("--device", "cpu", "--dtype", "float32", "--model-memory-gb", "0.006")
    copy_imported(str(sd_folder), folder / "server" / "bentoml")
    with start_server(folder / "server", str(first), str(second), *options) as server:
        yield server


def _generate(server: LiveServer, **body: Any) -> tuple[tuple[int, int], bytes]:
    response = httpx.post(f"{server.url}/v1/images/generations", json={**_QUICK, **body}, timeout=120)
    assert response.status_code == 200, response.text
    image = Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"])))
    return image.size, image.tobytes()


def test_both_models_are_listed_and_found_by_name(
    several: LiveServer, sd_folder: Path, v_prediction_folder: Path
) -> None:
    client = several.openai()
    assert [model.id for model in client.models.list().data] == ["owner/first", "second"]
    for name in ("owner/first", "SD1.5"):
        assert client.models.retrieve(name).id == "owner/first"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("third")
    health = several.health()
    assert health["model"] == "owner/first"
    store_names = [folder.name for folder in (sd_folder, v_prediction_folder)]
    assert [(model["id"], model["aliases"]) for model in health["models"]] == [
        ("owner/first", ["SD1.5", store_names[0]]),
        ("second", ["SD2", store_names[1]]),
    ]
    assert [model["embeddings"] for model in health["models"]] == [[], ["inkstyle"]]
    assert sum(model["in_memory"] for model in health["models"]) <= 1


def test_a_name_or_alias_selects_a_model(several: LiveServer) -> None:
    first, second = _generate(several), _generate(several, model="second")
    assert first[0] == (64, 64)
    assert second[0] == (96, 64)
    for name, expected in (("sd2", second), ("", first), ("OWNER/first", first), ("SD2", second)):
        assert _generate(several, model=name) == expected
    assert _generate(several, model="second", size="64x64") != first


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/images/generations", {"prompt": "a cat", "model": "gpt-image-1"}, "model"),
        ("/v1/images/jobs", {"prompt": "a cat", "model": "third"}, "model"),
        ("/v1/image/generation", {"prompt": "a cat", "model_name": "SDXL"}, "model_name"),
    ],
)
def test_an_unknown_name_is_not_found(
    several: LiveServer, path: str, body: dict[str, Any], param: str
) -> None:
    response = httpx.post(f"{several.url}{path}", json=body, timeout=60)
    message = assert_error(response, 404, param=param, code="model_not_found")
    assert message == f"'{param}': this server has no model '{body[param]}'; it has owner/first, second."


def test_answers_name_their_model(several: LiveServer) -> None:
    for name, expected in (("SD1.5", "owner/first"), ("second", "second")):
        for changes in ({}, {"stream": True}):
            body = {**_QUICK, "model": name, **changes}
            response = httpx.post(f"{several.url}/v1/images/generations", json=body, timeout=60)
            assert response.headers["x-hypergen-model"] == expected
    job = httpx.post(f"{several.url}/v1/images/jobs", json={**_QUICK, "model": "SD2"}, timeout=60)
    assert job.headers["x-hypergen-model"] == "second"


def test_every_route_selects_models_by_name(several: LiveServer) -> None:
    _, second = _generate(several, model="second", size="64x64", num_inference_steps=4)
    body = {"model_name": "SD2", "prompt": "a cat", "seed": 5, "width": 64, "height": 64, "steps": 4}
    hyperbolic = httpx.post(f"{several.url}/v1/image/generation", json=body, timeout=120).json()
    assert Image.open(io.BytesIO(base64.b64decode(hyperbolic["images"][0]["image"]))).tobytes() == second
    item = {**_QUICK, "model": "SD2", "size": "64x64", "num_inference_steps": 4}
    native = httpx.post(f"{several.url}/generate", json={"items": [item]}, timeout=120).json()
    assert Image.open(io.BytesIO(base64.b64decode(native[0]["images"][0]["b64_json"]))).tobytes() == second


def test_the_engine_names_the_model_of_each_log_line(several: LiveServer) -> None:
    _generate(several, model="second")
    _generate(several, model="owner/first")
    for model in ("owner/first", "second"):
        for start in (f"Loading {model}: ", f"Loaded {model} in "):
            lines = [line for line in several.log().splitlines() if start in line]
            assert lines
            assert {f"[engine {model}] INFO {start}" in line for line in lines} == {True}
    assert "[engine] " not in several.log()


def test_concurrent_requests_for_both_models_succeed(several: LiveServer) -> None:
    expected = {name: _generate(several, model=name) for name in ("SD1.5", "SD2")}
    names = ["SD1.5", "SD2"] * 4
    with ThreadPoolExecutor(len(names)) as clients:
        results = list(clients.map(lambda name: _generate(several, model=name), names))
    assert results == [expected[name] for name in names]


@pytest.mark.parametrize("name", [7, ["second"], {"id": "second"}])
def test_a_model_name_that_is_not_a_string_is_rejected(several: LiveServer, name: Any) -> None:
    response = httpx.post(f"{several.url}/v1/images/generations", json={**_QUICK, "model": name}, timeout=60)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "model"
