"""What /openapi.json says of the routes that BentoML serves beside ours."""

from __future__ import annotations

from typing import Any

from hypergen.api.request_body import MAX_ITEMS
from hypergen.api.schemas import PICTURE


def native_paths() -> dict[str, Any]:
    """Its batchable API, its probes and its metrics, as paths of an OpenAPI description."""
    return {
        "/generate": {"post": _generate()},
        "/metrics": {
            "get": _text("metrics", "Counters for Prometheus", "BentoML's, and hypergen_price_total")
        },
        "/livez": {"get": _probe("livez", "Whether the process should be kept")},
        "/healthz": {"get": _probe("healthz", "The same as /livez")},
        "/readyz": {"get": _probe("readyz", "Whether requests can be drawn")},
    }


def _generate() -> dict[str, Any]:
    item = {"type": "object", "description": "the fields of a generation, checked one by one"}
    items = {"type": "array", "items": item, "maxItems": MAX_ITEMS}
    body = {"type": "object", "properties": {"items": items}, "required": ["items"]}
    image = {
        "type": "object",
        "properties": {"b64_json": {"type": "string"}, "seed": {"type": "integer"}},
        "required": ["b64_json", "seed"],
    }
    result = {
        "type": "object",
        "properties": {
            "status": {"type": "integer", "description": "what the item alone would be answered"},
            "images": {"type": "array", "items": image},
            "error": {"type": ["object", "null"], "description": "as in errors, when the status is one"},
        },
        "required": ["status", "images"],
    }
    asked = {"items": [{"prompt": "a red circle on a blue background", "seed": 7}]}
    answer = {
        "schema": {"type": "array", "items": result},
        "example": [{"status": 200, "images": [{"b64_json": PICTURE, "seed": 7}], "error": None}],
    }
    errors: dict[str, Any] = {str(status): {} for status in (400, 413, 415, 500)}
    return {
        "operationId": "generate",
        "summary": "BentoML's batchable API: many items, each of which may fail alone",
        "tags": ["BentoML"],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": body, "example": asked}},
        },
        "responses": {"200": {"description": "One result for each", "content": {"application/json": answer}}}
        | errors,
    }


def _text(operation_id: str, summary: str, description: str, *statuses: int) -> dict[str, Any]:
    responses = {
        str(status): {"description": description, "content": {"text/plain": {"schema": {"type": "string"}}}}
        for status in (200, *statuses)
    }
    return {"operationId": operation_id, "summary": summary, "tags": ["BentoML"], "responses": responses}


def _probe(operation_id: str, summary: str) -> dict[str, Any]:
    return _text(operation_id, summary, "the status alone says it", 503)
