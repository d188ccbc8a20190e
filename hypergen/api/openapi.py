"""What /openapi.json says of the routes: bodies, answers, errors and examples.

Bodies come from the dialects' own fields, so that ranges stand in one place. They are those of the documents:
what this server and its model allow of them stands in /health.
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
        "Without a key: the Host is none of this server's, or a page of another site asks.",
        None,
    ),
    404: ("Not Found", "There is no such path, model, picture or job.", None),
    408: ("Request Timeout", "The body came too slowly.", None),
    413: ("Payload Too Large", "The body is larger than the server reads.", None),
    415: ("Unsupported Media Type", "The body is of another kind, or compressed.", None),
    429: (
        "Too Many Requests",
        "The queue and the door are full; `Retry-After` says when to come back.",
        None,
    ),
    500: ("Internal Server Error", "Drawing failed.", None),
    503: ("Service Unavailable", "Loading, recovering or shutting down; `Retry-After` says when.", None),
    504: ("Gateway Timeout", "The request took longer than the server allows.", None),
    507: ("Insufficient Storage", "No room for a `url`; `b64_json` needs none.", None),
}
GENERATION_ERRORS = (400, 401, 408, 413, 415, 429, 500, 503, 504, 507)
Described = dict[str, Any]


def request_body(content: Described) -> Described:
    return {"required": True, "content": content}


def media(schema: Described, example: object) -> Described:
    return {"schema": schema, "example": example}


def reference(model: type[BaseModel]) -> Described:
    """A named schema; `complete` must be given the model."""
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def responses(model: type[BaseModel], description: str, stream: Described | None = None) -> Described:
    """The answers of a route that generates images.

    Args:
        stream: the media of its server-sent events; absent: it has none.
    """
    content: Described = {"application/json": {"schema": reference(model)}}
    if stream is not None:
        content["text/event-stream"] = stream
    return {"200": {"description": description, "content": content}, **_errors(GENERATION_ERRORS)}


def create_job(bodies: Iterable[Described], form: Described) -> Described:
    """The route that begins a job.

    Args:
        bodies: the JSON schemas that it takes; the fields say which of them it is.
        form: the media of its form.
    """
    example = {"prompt": EXAMPLE_PROMPT, "n": 10}
    content = {"application/json": media({"anyOf": list(bodies)}, example), "multipart/form-data": form}
    described = job("Begin a job", "createImageJob", 202, GENERATION_ERRORS)
    return {
        **described,
        "description": "Takes the body of every route that generates images, but does not stream.",
        "requestBody": request_body(content),
    }


def job(summary: str, operation_id: str, status: int = 200, errors: Sequence[int] = (401, 404)) -> Described:
    """One route of jobs."""
    answer = {"description": summary, "content": {"application/json": {"schema": reference(ImageJob)}}}
    return {
        "operationId": operation_id,
        "summary": summary,
        "tags": ["Jobs"],
        "responses": {str(status): answer, **_errors(errors)},
    }


def server_route(operation_id: str, model: type[BaseModel], *statuses: int) -> Described:
    """A route about the server: its answer's schema, with each of the statuses."""
    content = {"application/json": {"schema": reference(model)}}
    answers = {str(status): {"description": model.__name__, "content": content} for status in statuses}
    return {"operationId": operation_id, "tags": ["Server"], "responses": answers}


def image_file() -> Described:
    """The file behind a `url`."""
    file = {"schema": {"type": "string", "format": "binary"}}
    content = dict.fromkeys((kind.media_type for kind in OUTPUT_FORMATS.values()), file)
    answers = {"200": {"description": "The file", "content": content}}
    return {"operationId": "getImageFile", "tags": ["Images"], "responses": answers}


def complete(schema: Described, models: Sequence[type[BaseModel]]) -> Described:
    """FastAPI's description with what all routes share: the key, the errors, the named schemas.

    Args:
        models: those that the dialects refer to.
    """
    schema = deepcopy(schema)  # FastAPI keeps its own for the next time
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
            operation["responses"].pop("422", None)  # bad parameters are 400 here
            is_open = path in OPEN_PATHS or path.startswith(FILES_PREFIX)
            operation["security"] = [] if is_open else [{"BearerAuth": []}]
            statuses = {int(status) for status in operation["responses"]} - {200, 202}
            statuses |= ({404} if "{" in path else set()) | ({403} if is_open else {401, 403})
            if path not in OPEN_PATHS:
                # Also those that stand there already: FastAPI drops what is null from their examples.
                operation["responses"].update(_errors(sorted(statuses)))
    return schema


def _errors(statuses: Iterable[int]) -> Described:
    described: Described = {}
    for status in statuses:
        title, meaning, param = _ERRORS[status]
        content = media(reference(ErrorResponse), envelope(status, meaning, param))
        described[str(status)] = {"description": title, "content": {"application/json": content}}
    return described


def _bentoml_paths() -> Described:
    """The routes that BentoML serves beside ours: its batchable API, its probes and its metrics."""
    counters = "BentoML's, and hypergen_price_total"
    return {
        "/generate": {"post": _generate()},
        "/metrics": {"get": _text("metrics", "Counters for Prometheus", counters)},
        "/livez": {"get": _probe("livez", "Whether the process should be kept")},
        "/healthz": {"get": _probe("healthz", "The same as /livez")},
        "/readyz": {"get": _probe("readyz", "Whether requests can be drawn")},
    }


def _generate() -> Described:
    item = {"type": "object", "description": "the fields of a generation, checked one by one"}
    items = {"type": "array", "items": item, "maxItems": MAX_ITEMS}
    body = {"type": "object", "properties": {"items": items}, "required": ["items"]}
    answer = media(
        {"type": "array", "items": reference(BatchResult)},
        [{"status": 200, "images": [{"b64_json": EXAMPLE_IMAGE, "seed": 7}], "error": None}],
    )
    errors: Described = {str(status): {} for status in (400, 413, 415, 500)}
    example = {"items": [{"prompt": EXAMPLE_PROMPT, "seed": 7}]}
    return {
        "operationId": "generate",
        "summary": "BentoML's batchable API: many items, each of which may fail alone",
        "tags": ["BentoML"],
        "requestBody": request_body({"application/json": media(body, example)}),
        "responses": {"200": {"description": "One result for each", "content": {"application/json": answer}}}
        | errors,
    }


def _text(operation_id: str, summary: str, description: str, *statuses: int) -> Described:
    content = {"text/plain": {"schema": {"type": "string"}}}
    answers = {str(status): {"description": description, "content": content} for status in (200, *statuses)}
    return {"operationId": operation_id, "summary": summary, "tags": ["BentoML"], "responses": answers}


def _probe(operation_id: str, summary: str) -> Described:
    return _text(operation_id, summary, "the status alone says it", 503)
