"""POST /v1/image/generation as in Hyperbolic's two documents."""

from __future__ import annotations

import base64
import time
from io import BytesIO
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.api.conftest import TightServer
from tests.support.http_client import JSON, as_json, assert_error, client_of, generate_files
from tests.support.image_files import as_base64, as_file, gradient
from tests.support.live_server import LiveServer
from tests.support.response_schemas import validate

PATH = "/v1/image/generation"
BODY: dict[str, Any] = {"model_name": "SDXL1.0-base", "prompt": "a red circle", "steps": 1}

# Response schemas of Hyperbolic's OpenAPI file.
SCHEMAS = yaml.safe_load("""
ImageGenerationResponse:
  type: object
  properties:
    images:
      type: array
      items:
        type: object
        properties:
          image: {type: string}
          seed: {type: integer}
    inference_time: {type: number}
ErrorResponse:
  type: object
  properties:
    error:
      type: object
      properties:
        message: {type: string}
        type: {type: string}
        code: {type: string}
""")


def generate(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post(PATH, json={**BODY, **fields})
    assert response.status_code == 200, response.text
    return response.json()


NOT_A_STRING = [True, 1, 1.5, [], {}]
NOT_AN_INTEGER = [True, 1.5, "2", "", [], {}]
NOT_A_NUMBER = [True, "2", "", [], {}]
INPUT_IMAGE = as_base64(as_file(gradient()))

REJECTED: dict[str, list[Any]] = {
    "model_name": [*NOT_A_STRING, ""],
    "prompt": [*NOT_A_STRING, "", " ", "a" * 32001],
    "negative_prompt": [*NOT_A_STRING, "a" * 32001],
    "steps": [*NOT_AN_INTEGER, 0, -1, 101],
    "cfg_scale": [*NOT_A_NUMBER, 0, 0.99, 20.01, -1],
    "width": [*NOT_AN_INTEGER, 0, 56, 65, 100, 2056, 2432, 4096],
    "height": [*NOT_AN_INTEGER, 0, 56, 65, 100, 2056, 2432, 4096],
    "seed": [*NOT_AN_INTEGER, -2, 2**63, 2**70],
    "n": [*NOT_AN_INTEGER, 0, 5, -1],
    "sampler": [*NOT_A_STRING, "", "eular"],
    "backend": ["", "AUTO", "onnx", 1, True],
    "prompt_2": [*NOT_A_STRING, "a" * 32001],
    "negative_prompt_2": NOT_A_STRING,
    "enable_refiner": ["true", 1, 0, ""],
    "true_cfg_scale": ["2", 0.99, 20.01, 4.0],
    "image": [*NOT_A_STRING, "", "abc", "https://example.com/a.png"],
    "strength": [*NOT_A_NUMBER, -0.1, 1.1],
    "lora": [True, "Pixel_Art", ["Pixel_Art"], {"Pixel_Art": 1.0}, {"Pixel_Art": 3}, {"Pixel_Art": "1"}],
    "controlnet_name": [*NOT_A_STRING, "", "canny"],
    "controlnet_image": [*NOT_A_STRING, INPUT_IMAGE],
    "control_preprocessor": ["", "depth", 1],
    "controlnet_conditioning_scale": [*NOT_A_NUMBER, -0.1, 2.1],
    "control_guidance_start": [*NOT_A_NUMBER, -0.1, 1.1],
    "control_guidance_end": [*NOT_A_NUMBER, -0.1, 1.1],
}
ACCEPTED: dict[str, list[Any]] = {
    "model_name": ["FLUX.1-dev", "SD1.5", "x"],
    "negative_prompt": ["", "blurry"],
    "steps": [1, 50],
    "cfg_scale": [1, 5, 20, 7.5],
    "seed": [-1, 0, 42, 2**63 - 1],
    "n": [1, 4],
    "sampler": ["euler"],
    "backend": ["auto", "tvm", "torch"],
    "prompt_2": ["", "in oil"],
    "negative_prompt_2": ["", "blurry"],
    "enable_refiner": [True, False],
    "strength": [0, 1, 0.7],
    "lora": [{}],
    "unknown": [1, "x", []],
}


def pairs(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(field, value, id=f"{field}-{number}-{ascii(value)[:20]}")
        for field, values in table.items()
        for number, value in enumerate(values)
    ]


@pytest.mark.parametrize(("field", "value"), pairs(REJECTED))
def test_an_invalid_value_is_rejected_with_its_param(client: httpx.Client, field: str, value: Any) -> None:
    response = client.post(PATH, content=as_json({**BODY, field: value}), headers=JSON)
    assert_error(response, 400, param=field)
    validate(response.json(), SCHEMAS["ErrorResponse"])


@pytest.mark.parametrize(("field", "value"), pairs(ACCEPTED))
def test_a_valid_value_is_accepted(client: httpx.Client, field: str, value: Any) -> None:
    body = generate(client, **{field: value})
    assert len(body["images"]) == (value if field == "n" else 1)
    validate(body, SCHEMAS["ImageGenerationResponse"])


@pytest.mark.parametrize("field", [field for field in REJECTED if field not in ("model_name", "prompt")])
def test_null_means_absent(client: httpx.Client, field: str) -> None:
    generate(client, **{"steps": 1, field: None} if field != "steps" else {})


@pytest.mark.parametrize("field", ["model_name", "prompt"])
def test_missing_required_fields_are_rejected_with_their_param(client: httpx.Client, field: str) -> None:
    response = client.post(PATH, json={name: value for name, value in BODY.items() if name != field})
    assert_error(response, 400, param=field, code="missing_required_parameter")


def test_the_response_has_images_seeds_and_the_time(client: httpx.Client) -> None:
    started = time.perf_counter()
    body = generate(client, n=3, seed=8, width=64, height=72, steps=4)
    wall_s = time.perf_counter() - started
    assert set(body) == {"images", "inference_time"}
    assert 0 < body["inference_time"] <= wall_s
    assert [set(image) for image in body["images"]] == [{"image", "seed"}] * 3
    assert [image["seed"] for image in body["images"]] == [8, 9, 10]
    for image in body["images"]:
        generated = Image.open(BytesIO(base64.b64decode(image["image"], validate=True)))
        assert (generated.format, generated.size) == ("PNG", (64, 72))


def test_each_seed_generates_the_same_image_alone(client: httpx.Client) -> None:
    body = generate(client, n=2)
    second = body["images"][1]
    assert generate(client, seed=second["seed"])["images"][0]["image"] == second["image"]


def test_the_same_settings_give_the_same_file_in_both_dialects(client: httpx.Client) -> None:
    body = generate(
        client, seed=5, steps=3, cfg_scale=4, width=64, height=128, negative_prompt="blue", sampler="heun"
    )
    files = generate_files(
        client,
        seed=5,
        num_inference_steps=3,
        guidance_scale=4,
        size="64x128",
        negative_prompt="blue",
        sampler="heun",
    )
    assert [base64.b64decode(image["image"]) for image in body["images"]] == files


def test_errors_have_the_documented_status_codes(client: httpx.Client, keyed_server: LiveServer) -> None:
    for body in (b"[]", b"{", b"", b'{"model_name": NaN}'):
        assert_error(client.post(PATH, content=body, headers=JSON), 400, code="invalid_json")
    with httpx.Client(base_url=keyed_server.url) as client_without_key:
        response = client_without_key.post(PATH, json=BODY)
    assert_error(response, 401)
    validate(response.json(), SCHEMAS["ErrorResponse"])
    with client_of(keyed_server) as keyed:
        generate(keyed)


def test_the_price_is_in_a_header_if_a_rate_is_set(tight: TightServer) -> None:
    response = tight.client.post(PATH, json={**BODY, "width": 128, "height": 128, "steps": 5, "n": 2})
    assert response.status_code == 200
    assert response.headers["x-hypergen-price"] == "0.0000625"


def test_the_price_metric_counts_finished_images(tight: TightServer) -> None:
    before = total_price(tight.client)
    body = {**BODY, "width": 128, "height": 128, "steps": 5}
    assert tight.client.post(PATH, json={**body, "n": 2}).status_code == 200
    assert total_price(tight.client) - before == pytest.approx(0.0000625)
    assert tight.client.post(PATH, json={**body, "n": 5}).status_code == 400
    job = tight.client.post("/v1/images/jobs", json=body)
    assert job.headers["x-hypergen-price"] == "0.00003125"
    until = time.monotonic() + 30
    while tight.client.get(job.headers["location"]).json()["status"] != "succeeded":
        assert time.monotonic() < until
        time.sleep(0.02)
    assert total_price(tight.client) - before == pytest.approx(0.00009375)


def total_price(client: httpx.Client) -> float:
    """The total price of the served model's images in the metrics."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    priced = [sample for sample in samples if sample.name == "hypergen_price_total"]
    assert {sample.labels["model"] for sample in priced} <= {"owner/small-sd"}
    return sum(sample.value for sample in priced)


def test_without_a_rate_there_is_no_price(client: httpx.Client) -> None:
    assert "x-hypergen-price" not in client.post(PATH, json=BODY).headers
    assert "hypergen_price" not in client.get("/metrics").text


@pytest.mark.parametrize("model_name", ["FLUX.1-dev", "FLUX.1-schnell", "flux"])
def test_an_image_with_a_flux_model_name_is_rejected(client: httpx.Client, model_name: str) -> None:
    response = client.post(PATH, json={**BODY, "model_name": model_name, "image": INPUT_IMAGE})
    assert "FLUX" in assert_error(response, 400, param="image")


def test_unsupported_optional_fields_are_ignored(client: httpx.Client) -> None:
    fields = {"prompt_2": "in oil", "negative_prompt_2": "blurry", "enable_refiner": True}
    assert generate(client, seed=4, **fields)["images"] == generate(client, seed=4)["images"]


def test_unsupported_loras_and_controlnet_are_rejected(client: httpx.Client) -> None:
    assert_error(client.post(PATH, json={**BODY, "lora": {"Pixel_Art": 1}}), 400, param="lora")
    response = client.post(PATH, json={**BODY, "controlnet_image": INPUT_IMAGE})
    message = assert_error(response, 400, param="controlnet_image", code="unsupported_parameter")
    assert message == "'controlnet_image' is not supported by the served model (sd)."
