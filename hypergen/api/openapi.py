"""Helpers for /openapi.json: bodies, responses, errors and examples.

Body schemas are generated from the dialects' pydantic models. Their ranges are those of the documented APIs;
a server may allow less.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from hypergen.api.auth import FILES_PREFIX, OPEN_PATHS
from hypergen.api.errors import envelope
from hypergen.api.request_body import MAX_ITEMS
from hypergen.api.schemas import SCHEMAS, BatchResult, ErrorResponse, ImageJob
from hypergen.images.encoding import OUTPUT_FORMATS

EXAMPLE_PROMPT = "a red circle on a blue background"
# A red square of 8 x 8 pixels, as base64 of a PNG.
EXAMPLE_IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGP8z4AdMOEQH6QSAM1BAQ/oQeJvAAAAAElFTkSuQmCC"
)
_ERRORS = {
    400: ("Bad Request", "A field is missing, malformed or out of range; `param` names it.", "n"),
    401: ("Unauthorized", "No key, a wrong key, or another scheme than Bearer.", None),
    403: (
        "Forbidden",
        "Without a key: the Host is not this server's, or the request comes from a page of another site.",
        None,
    ),
    404: ("Not Found", "The path, model, image or job does not exist.", None),
    408: ("Request Timeout", "The body arrived too slowly.", None),
    409: (
        "Conflict",
        "The `Idempotency-Key` was used before, for another request.",
        "Idempotency-Key",
    ),
    413: ("Payload Too Large", "The body exceeds the size limit.", None),
    415: ("Unsupported Media Type", "The media type is unsupported, or the body is compressed.", None),
    429: (
        "Too Many Requests",
        "The request queue and the overflow queue are full; retry after `Retry-After` seconds.",
        None,
    ),
    500: ("Internal Server Error", "Generation failed.", None),
    503: (
        "Service Unavailable",
        "Loading, recovering, shutting down, or no object storage; retry after `Retry-After` seconds.",
        None,
    ),
    504: ("Gateway Timeout", "The request took longer than the server allows.", None),
    507: ("Insufficient Storage", "No disk space for a `url`; use `b64_json`.", None),
}
GENERATION_ERRORS = (400, 401, 408, 409, 413, 415, 429, 500, 503, 504, 507)
Json = dict[str, Any]
_IDEMPOTENCY_KEY: Json = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "a repeat with the same key and body gets the answer of the first; not for streams",
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
}


def request_body(content: Json) -> Json:
    return {"required": True, "content": content}


def media(schema: Json, example: object) -> Json:
    return {"schema": schema, "example": example}


def reference(model: type[BaseModel]) -> Json:
    """A reference to a named schema; pass the model to `complete` too."""
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def responses(model: type[BaseModel], description: str, stream: Json | None = None) -> Json:
    """The responses of a route that generates images.

    Args:
        stream: the media type object of its server-sent events; None: no streaming.
    """
    content: Json = {"application/json": {"schema": reference(model)}}
    if stream is not None:
        content["text/event-stream"] = stream
    return {"200": {"description": description, "content": content}, **_errors(GENERATION_ERRORS)}


def create_job(bodies: Iterable[Json], form: Json) -> Json:
    """The route that creates a job.

    Args:
        bodies: the JSON schemas that it accepts; the fields of a body decide which one applies.
        form: the media type object of its form.
    """
    example = {"prompt": EXAMPLE_PROMPT, "n": 10}
    content = {"application/json": media({"anyOf": list(bodies)}, example), "multipart/form-data": form}
    operation = job("Create a job", "createImageJob", 202, GENERATION_ERRORS)
    return {
        **operation,
        "description": "Accepts the body of any route that generates images, without streaming.",
        "requestBody": request_body(content),
    }


def job(summary: str, operation_id: str, status: int = 200, errors: Sequence[int] = (401, 404)) -> Json:
    """A route of jobs."""
    response = {"description": summary, "content": {"application/json": {"schema": reference(ImageJob)}}}
    return {
        "operationId": operation_id,
        "summary": summary,
        "tags": ["Jobs"],
        "responses": {str(status): response, **_errors(errors)},
    }


def server_route(operation_id: str, model: type[BaseModel], *statuses: int) -> Json:
    """A route about the server, with one response schema for all statuses."""
    content = {"application/json": {"schema": reference(model)}}
    by_status = {str(status): {"description": model.__name__, "content": content} for status in statuses}
    return {"operationId": operation_id, "tags": ["Server"], "responses": by_status}


def image_file() -> Json:
    """The route of a stored image."""
    file = {"schema": {"type": "string", "format": "binary"}}
    content = dict.fromkeys((file_format.media_type for file_format in OUTPUT_FORMATS.values()), file)
    by_status = {"200": {"description": "The image file", "content": content}}
    return {"operationId": "getImageFile", "tags": ["Images"], "responses": by_status}


def complete(schema: Json, models: Sequence[type[BaseModel]]) -> Json:
    """Add the parts that all routes share: security, errors, named schemas, BentoML's routes.

    Args:
        models: the schemas that the dialects refer to.
    """
    schema = deepcopy(schema)  # FastAPI caches the original
    named = models_json_schema(
        [(model, "validation") for model in (*SCHEMAS, *models)], ref_template="#/components/schemas/{model}"
    )[1]
    schema["components"] = {
        "securitySchemes": {"BearerAuth": {"type": "http", "scheme": "bearer", "bearerFormat": "API Key"}},
        "schemas": named["$defs"],
    }
    schema["paths"] |= _bentoml_paths()
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            if "409" in operation["responses"]:
                operation["parameters"] = [*operation.get("parameters", ()), _IDEMPOTENCY_KEY]
            operation["responses"].pop("422", None)  # invalid parameters get 400 here
            is_open = path in OPEN_PATHS or path.startswith(FILES_PREFIX)
            operation["security"] = [] if is_open else [{"BearerAuth": []}]
            statuses = {int(status) for status in operation["responses"]} - {200, 202}
            statuses |= ({404} if "{" in path else set()) | ({403} if is_open else {401, 403})
            if path not in OPEN_PATHS:
                # Also the existing ones, because FastAPI drops null values from their examples.
                operation["responses"].update(_errors(sorted(statuses)))
    return schema


def _errors(statuses: Iterable[int]) -> Json:
    by_status: Json = {}
    for status in statuses:
        title, meaning, param = _ERRORS[status]
        content = media(reference(ErrorResponse), envelope(status, meaning, param))
        by_status[str(status)] = {"description": title, "content": {"application/json": content}}
    return by_status


def _bentoml_paths() -> Json:
    """BentoML's own routes: its batchable API, its health probes and its metrics."""
    return {
        "/generate": {"post": _generate()},
        "/metrics": {
            "get": _text(
                "metrics",
                "Prometheus metrics",
                "hypergen_...: requests, images, queue, stages, batches, engines, prices; and BentoML's own",
            )
        },
        "/livez": {"get": _probe("livez", "Liveness probe")},
        "/healthz": {"get": _probe("healthz", "Liveness probe, as /livez")},
        "/readyz": {"get": _probe("readyz", "Readiness probe")},
    }


def _generate() -> Json:
    item = {
        "type": "object",
        "description": "the fields of POST /v1/images/generations; each item is validated separately",
    }
    items = {"type": "array", "items": item, "maxItems": MAX_ITEMS}
    body = {"type": "object", "properties": {"items": items}, "required": ["items"]}
    results = media(
        {"type": "array", "items": reference(BatchResult)},
        [{"status": 200, "images": [{"b64_json": EXAMPLE_IMAGE, "seed": 7}], "error": None}],
    )
    errors: Json = {str(status): {} for status in (400, 413, 415, 500)}
    example = {"items": [{"prompt": EXAMPLE_PROMPT, "seed": 7}]}
    return {
        "operationId": "generate",
        "summary": "BentoML's batchable API: many items, which fail independently",
        "tags": ["BentoML"],
        "requestBody": request_body({"application/json": media(body, example)}),
        "responses": {"200": {"description": "One result per item", "content": {"application/json": results}}}
        | errors,
    }


def _text(operation_id: str, summary: str, description: str, *statuses: int) -> Json:
    content = {"text/plain": {"schema": {"type": "string"}}}
    by_status = {str(status): {"description": description, "content": content} for status in (200, *statuses)}
    return {"operationId": operation_id, "summary": summary, "tags": ["BentoML"], "responses": by_status}


def _probe(operation_id: str, summary: str) -> Json:
    return _text(operation_id, summary, "only the status matters", 503)
