"""/openapi.json: its contents, and whether responses match it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import yaml

from tests.api.test_hyperbolic import BODY, PATH
from tests.support.http_client import GENERATIONS, QUICK, generate
from tests.support.response_schemas import validate

# The operation of Hyperbolic's OpenAPI file, from which clients were generated.
OPERATION = yaml.safe_load("""
summary: Hyperbolic Generate An Image
operationId: generateImage
tags: [Image Generation]
requestBody:
  required: true
  content:
    application/json:
      schema: {$ref: '#/components/schemas/ImageGenerationRequest'}
      examples:
        SDXLBasic:
          summary: Basic SDXL generation
          value:
            model_name: SDXL1.0-base
            prompt: A photorealistic cyberpunk cat wearing sunglasses
            steps: 30
            cfg_scale: 7.5
            height: 1024
            width: 1024
responses:
  '200':
    description: Successful image generation
    content: {application/json: {schema: {$ref: '#/components/schemas/ImageGenerationResponse'}}}
  '400':
    description: Bad Request
    content: {application/json: {schema: {$ref: '#/components/schemas/ErrorResponse'}}}
  '401':
    description: Unauthorized
    content: {application/json: {schema: {$ref: '#/components/schemas/ErrorResponse'}}}
  '429':
    description: Too Many Requests
    content: {application/json: {schema: {$ref: '#/components/schemas/ErrorResponse'}}}
""")
RANGES = {"steps": (1, 100), "cfg_scale": (1, 20), "n": (1, 4), "width": (64, 2432), "height": (64, 2432)}


@pytest.fixture(scope="module")
def openapi(client: httpx.Client) -> dict[str, Any]:
    return client.get("/openapi.json").json()


def schema(openapi: dict[str, Any], name: str) -> dict[str, Any]:
    """A named schema with all references resolved."""

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return resolve(openapi["components"]["schemas"][value["$ref"].rpartition("/")[2]])
            return {key: resolve(inner) for key, inner in value.items()}
        return [resolve(inner) for inner in value] if isinstance(value, list) else value

    return resolve({"$ref": name})


def contains(whole: Any, part: Any) -> bool:
    if isinstance(part, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    return whole == part


def test_hyperbolics_operation_is_included(openapi: dict[str, Any]) -> None:
    operation = openapi["paths"][PATH]["post"]
    assert contains(operation, OPERATION)
    assert operation["security"] == [{"BearerAuth": []}]
    scheme = {"type": "http", "scheme": "bearer", "bearerFormat": "API Key"}
    assert openapi["components"]["securitySchemes"]["BearerAuth"] == scheme
    request = schema(openapi, "ImageGenerationRequest")
    assert set(request["required"]) == {"model_name", "prompt"}
    for field, (least, most) in RANGES.items():
        field_schema = request["properties"][field]
        options = field_schema.get("anyOf", [field_schema])
        assert (options[0]["minimum"], options[0]["maximum"]) == (least, most)


def test_every_route_has_a_unique_name_errors_and_examples(openapi: dict[str, Any]) -> None:
    image_routes = {
        GENERATIONS,
        "/v1/images/edits",
        "/v1/images/variations",
        "/v1/image/generation",
        "/v1/images/jobs",
    }
    others = {"/v1/models", "/v1/models/{model}", "/health", "/generate", "/metrics", "/livez", "/readyz"}
    assert image_routes | others <= set(openapi["paths"])
    operations = [
        (path, method, operation)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    names = [operation["operationId"] for _, _, operation in operations]
    assert len(names) == len(set(names))
    for path, _, operation in operations:
        assert operation["summary"]
        assert "422" not in operation["responses"]
        if path.startswith("/v1/") and "/files/" not in path:
            assert "401" in operation["responses"]
    for path in image_routes:
        operation = openapi["paths"][path]["post"]
        assert {"400", "401", "413", "415", "429", "500", "503", "504"} <= set(operation["responses"])
        for media in operation["requestBody"]["content"].values():
            assert "example" in media or "examples" in media or media["schema"]["properties"]["image"]


def test_every_field_has_a_description(openapi: dict[str, Any]) -> None:
    for path in (GENERATIONS, "/v1/images/edits"):
        content = openapi["paths"][path]["post"]["requestBody"]["content"]
        fields = content["application/json"]["schema"]["properties"]
        assert {"prompt", "strength", "prompt_2", "control_image"} <= set(fields)
        assert [name for name, field in fields.items() if not field.get("description")] in (
            [],
            ["images", "mask"],
        )


def test_responses_match_their_schemas(client: httpx.Client, openapi: dict[str, Any]) -> None:
    validate(generate(client, n=2), schema(openapi, "ImagesResponse"))
    validate(client.post(PATH, json=BODY).json(), schema(openapi, "ImageGenerationResponse"))
    validate(client.post(PATH, json={}).json(), schema(openapi, "ErrorResponse"))
    validate(client.get("/v1/models").json(), schema(openapi, "ModelList"))
    validate(client.get("/health").json(), schema(openapi, "Health"))
    job = client.post("/v1/images/jobs", json=QUICK).json()
    validate(job, schema(openapi, "ImageJob"))


def test_error_examples_match_the_error_schema(openapi: dict[str, Any]) -> None:
    error = schema(openapi, "ErrorResponse")
    for methods in openapi["paths"].values():
        for operation in methods.values():
            for status, response in operation["responses"].items():
                if int(status) >= 400 and "ErrorResponse" in str(response):
                    validate(response["content"]["application/json"]["example"], error)
