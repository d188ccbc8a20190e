"""GET /v1/models, GET /health, and generation with the official client."""

from __future__ import annotations

import re
import time
from pathlib import Path

import httpx
import pytest

from tests.api.conftest import TightServer
from tests.support.http_client import assert_error, generate_files
from tests.support.live_server import LiveServer


def test_only_the_served_model_is_listed(client: httpx.Client, sd_folder: Path) -> None:
    body = client.get("/v1/models").json()
    assert set(body) == {"object", "data"}
    assert body["object"] == "list"
    (model,) = body["data"]
    assert set(model) == {"id", "object", "created", "owned_by"}
    assert model["id"] == str(sd_folder)
    assert model["object"] == "model"
    assert model["owned_by"] == "hypergen"
    assert abs(model["created"] - time.time()) < 10


def test_the_official_client_reads_the_models(server: LiveServer, tight: TightServer) -> None:
    for live in (server, tight.server):
        with live.openai() as client:
            (model,) = client.models.list().data
            assert client.models.retrieve(model.id).id == model.id


@pytest.mark.parametrize(
    "path", ["owner/small-sd", "owner%2Fsmall-sd", "/owner/small-sd", "%2Fowner%2Fsmall-sd"]
)
def test_a_model_is_found_by_its_id_with_escaped_and_extra_slashes(tight: TightServer, path: str) -> None:
    response = tight.client.get(f"/v1/models/{path}")
    assert response.json()["id"] == "owner/small-sd"


@pytest.mark.parametrize(
    "name",
    ["gpt-image-1", "owner", "owner/small", "owner/small-sd/x", "Owner/small-sd", "a" * 5000, "%ff", ""],
)
def test_other_models_are_not_found(tight: TightServer, name: str) -> None:
    assert_error(tight.client.get(f"/v1/models/{name}"), 404, param="model", code="model_not_found")


def test_health_has_state_model_queue_and_device(client: httpx.Client, sd_folder: Path) -> None:
    response = client.get("/health")
    assert response.status_code == 200
    body = response.json()
    assert body["status"] == "healthy"
    assert body["model"] == str(sd_folder)
    assert body["queue_size"] == 0
    assert body["device"] == "cpu"
    assert "euler" in body["samplers"]
    (model,) = body["models"]
    assert model["defaults"] == {
        "size": "128x128",
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "lora_path": None,
    }
    assert model["max_loras"] == 4
    assert body["limits"]["max_side"] == 2048


def test_the_startup_time_is_reported_by_stage(server: LiveServer) -> None:
    (engine,) = server.health()["engines"]
    assert list(engine["startup_s"]) == ["imports", "weights", "warm-up"]
    assert min(engine["startup_s"].values()) > 0
    (ready,) = [line for line in server.log().splitlines() if "Ready after" in line]
    for stage in ("service", *engine["startup_s"]):
        assert re.search(rf"\b{stage} \d+\.\d", ready)


def test_the_official_client_generates_images(server: LiveServer, client: httpx.Client) -> None:
    extra = {"seed": 9, "num_inference_steps": 1, "negative_prompt": "blue", "guidance_scale": 2.5}
    with server.openai() as official:
        response = official.images.generate(
            prompt="a red circle",
            model="gpt-image-1",
            n=2,
            size="64x64",  # pyright: ignore[reportArgumentType]  OpenAI's own models generate only larger images
            quality="high",
            output_format="webp",
            user="somebody",
            extra_body=extra,
        )
    assert response.data
    assert response.usage
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert len({item.b64_json for item in response.data}) == 2
    fields = {"n": 2, "size": "64x64", "output_format": "webp", **extra}
    files = generate_files(client, prompt="a red circle", **fields)
    assert [httpx.get(item.url or "").content for item in response.data] == files


def test_openapi_json_has_the_paths_and_fields(server: LiveServer, client: httpx.Client) -> None:
    body = client.get("/openapi.json").json()
    assert {"/v1/images/generations", "/v1/models", "/v1/models/{model}", "/health"} <= set(body["paths"])
    content = body["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]
    fields = content["application/json"]["schema"]["properties"]
    assert {"prompt", "n", "size", "seed", "negative_prompt", "sampler", "lora_scale"} <= set(fields)
    assert client.get("/docs").status_code == 200
    assert "UserWarning" not in server.log()
