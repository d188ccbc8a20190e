"""Valid and invalid values of every field of POST /v1/images/generations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.http_client import GENERATIONS, JSON, QUICK, as_json, assert_error, generate

NOT_A_STRING = [True, 1, 1.5, [], {}]
NOT_AN_INTEGER = [True, 1.5, "2", "", [], {}]
NOT_A_NUMBER = [True, "2", "", [], {}]
NOT_AN_OPTION = ["", "AUTO", "best", 1, True, [], {}]

REJECTED: dict[str, list[Any]] = {
    "prompt": [*NOT_A_STRING, "", " \t\n", "\u00a0", "a" * 32001, ["a"]],
    "model": NOT_A_STRING,
    "n": [*NOT_AN_INTEGER, 0, -1, 11, 2**70],
    "quality": NOT_AN_OPTION,
    "style": [*NOT_AN_OPTION, "auto"],
    "background": [*NOT_AN_OPTION, "transparent"],
    "moderation": [*NOT_AN_OPTION, "high"],
    "output_format": [*NOT_AN_OPTION, "gif", "svg", "jpg", "PNG"],
    "output_compression": [*NOT_AN_INTEGER, -1, 101],
    "response_format": [*NOT_AN_OPTION, "b64"],
    "stream": ["true", 1, 0, "", []],
    "partial_images": [*NOT_AN_INTEGER, -1, 4],
    "user": NOT_A_STRING,
    "safety_identifier": NOT_A_STRING,
    "negative_prompt": [*NOT_A_STRING, "a" * 32001],
    "num_inference_steps": [*NOT_AN_INTEGER, 0, -1, 151, 2**70],
    "guidance_scale": [*NOT_A_NUMBER, 0.01, 0.99, -1, 20.01, 21, 10**400],
    "clip_skip": [*NOT_AN_INTEGER, 0, -1, 13, 3, 12],  # the model's text encoder has two layers
    # Unsupported by Stable Diffusion, for any value.
    "true_cfg_scale": [*NOT_A_NUMBER, 0.99, 20.01, 1, 4.0, 20],
    "seed": [*NOT_AN_INTEGER, -2, 2**63, 2**64, 2**70, 1e300, 10**4000],
    "sampler": [*NOT_A_STRING, "", "eular", "Euler 2", "__class__"],
    "lora_path": [*NOT_A_STRING, "", "no-style", "/etc/passwd", "../x.safetensors", "a\0b", "http://x/y"],
    "lora_scale": [*NOT_A_NUMBER, -0.1, 2.1, 10**400],
    "loras": ["style", 1, ["style"], {"x": 1}, {"style": 2.1}, {"style": -0.1}, {"style": "1"}],
}

ACCEPTED: dict[str, list[Any]] = {
    "prompt": ["a", "a" * 32000, "🦊" * 250, "\u202eright to left", "a\0b", "{0} %s ${x} '; DROP", "\uffff"],
    "model": ["gpt-image-1", "dall-e-3", "", "no/such/model"],
    "n": [1, 1.0, 10],
    "quality": ["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"],
    "style": ["vivid", "natural"],
    "background": ["auto", "opaque"],
    "moderation": ["low", "auto"],
    "output_format": ["png", "jpeg", "webp"],
    "output_compression": [100],
    "response_format": ["url", "b64_json"],
    "stream": [False],
    "partial_images": [0, 3],
    "user": ["user-1", ""],
    "safety_identifier": ["abc"],
    "negative_prompt": ["", "text", "a" * 32000],
    "num_inference_steps": [1, 150],
    "guidance_scale": [1, 1.0, 20, 20.0, 7.25],
    "clip_skip": [1, 2],
    "seed": [-1, 0, 1, 7.0, 2**63 - 1],
    "sampler": ["ddim", "euler"],
    "lora_scale": [0, 0.0, 1, 2, 2.0],
    "lora_path": ["style", "style.safetensors"],
    "loras": [{}, {"style": 0}, {"style": 2}, {"style": 0.5}],
}


def pairs(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(field, value, id=f"{field}-{number}-{ascii(value)[:20]}")
        for field, values in table.items()
        for number, value in enumerate(values)
    ]


@pytest.mark.parametrize(("field", "value"), pairs(REJECTED))
def test_an_invalid_value_is_rejected_with_its_param(client: httpx.Client, field: str, value: Any) -> None:
    response = client.post(GENERATIONS, content=as_json({**QUICK, field: value}), headers=JSON)
    assert_error(response, 400, param=field)
    assert "openai-processing-ms" not in response.headers


@pytest.mark.parametrize(("field", "value"), pairs(ACCEPTED))
def test_a_valid_value_is_accepted(client: httpx.Client, field: str, value: Any) -> None:
    body = generate(client, **{field: value})
    assert len(body["data"]) == (value if field == "n" else 1)


@pytest.mark.parametrize("field", [field for field in REJECTED if field != "prompt"])
def test_null_means_absent(client: httpx.Client, field: str) -> None:
    fields = {field: None} if field == "num_inference_steps" else {**QUICK, field: None}
    response = client.post(GENERATIONS, json={**fields, "prompt": "a"})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("body", [{}, {"prompt": None}, {"promt": "a red circle"}])
def test_a_missing_prompt_is_rejected_with_its_param(client: httpx.Client, body: dict[str, Any]) -> None:
    response = client.post(GENERATIONS, json=body)
    assert_error(response, 400, param="prompt", code="missing_required_parameter")


def test_guidance_scale_0_is_no_guidance(client: httpx.Client) -> None:
    answers = [generate(client, guidance_scale=scale, seed=3) for scale in (1, 0, 0.0, 2)]
    one, zero, zero_as_float, two = (answer["data"][0]["b64_json"] for answer in answers)
    assert one == zero == zero_as_float != two


@pytest.mark.parametrize("field", ["n", "seed", "num_inference_steps", "guidance_scale", "lora_scale"])
@pytest.mark.parametrize("literal", ["1e999", "-1e999", "9" * 4000])
def test_numbers_beyond_every_range_are_rejected(client: httpx.Client, field: str, literal: str) -> None:
    body = f'{{"prompt": "a", "{field}": {literal}}}'
    assert_error(client.post(GENERATIONS, content=body, headers=JSON), 400, param=field)


@pytest.mark.parametrize(
    "field", ["prompt", "negative_prompt", "size", "sampler", "quality", "output_format"]
)
def test_lone_surrogates_are_rejected(client: httpx.Client, field: str) -> None:
    body = as_json({**QUICK, field: "\ud800"})
    assert_error(client.post(GENERATIONS, content=body, headers=JSON), 400, param=field)


def test_lora_paths_get_the_same_error_whether_or_not_the_file_exists(
    client: httpx.Client, lora_folder: Path
) -> None:
    outside = [str(lora_folder.parent / "x.safetensors"), f"{lora_folder}/../loras/style.safetensors"]
    paths = [
        *outside,
        "/etc/passwd",
        "/etc/nothing",
        "~/x",
        "$HOME",
        "//host/share",
        "C:\\x",
        "\uff0e\uff0e/x",
    ]
    responses = {client.post(GENERATIONS, json={**QUICK, "lora_path": path}).text for path in paths}
    assert len(responses) == 1


def test_unknown_fields_are_ignored(client: httpx.Client) -> None:
    unknown = {
        "complexity": 3,
        "frame_count": "many",
        "svg": {},
        "latents": [1],
        "callback_on_step_end": "x",
        "__class__": "x",
        "device": "cuda:7",
        "generator": 1,
    }
    assert (
        generate(client, seed=5)["data"][0]["b64_json"]
        == generate(client, seed=5, **unknown)["data"][0]["b64_json"]
    )


def test_query_parameters_and_unknown_headers_are_ignored(client: httpx.Client) -> None:
    headers = {"X-OpenWebUI-User": "a", "openai-organization": "org", "x-stainless-lang": "python"}
    query = {"api-version": "2024-10-21", "n": "99"}
    response = client.post(GENERATIONS, json=QUICK, params=query, headers=headers)
    assert response.status_code == 200
    assert len(response.json()["data"]) == 1


def test_a_seed_of_minus_one_is_random(client: httpx.Client) -> None:
    seeds = {generate(client, seed=-1)["data"][0]["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert min(seeds) >= 0


def test_png_supports_no_output_compression(client: httpx.Client) -> None:
    response = client.post(GENERATIONS, json={**QUICK, "output_compression": 50})
    assert_error(response, 400, param="output_compression")


def test_the_error_has_the_minimum_steps_of_a_sampler(client: httpx.Client) -> None:
    response = client.post(GENERATIONS, json={**QUICK, "sampler": "dpmpp_singlestep"})
    message = assert_error(response, 400, param="num_inference_steps")
    assert "at least 2" in message
