"""What /openapi.json says of the routes: bodies, answers, errors and examples.

Bodies come from the dialects' own fields, so that ranges stand in one place. They are those of the documents:
what this server and its model allow of them stands in /health.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from pydantic import BaseModel

from hypergen.api.auth import FILES_PREFIX, OPEN_PATHS
from hypergen.api.dialects import hyperbolic, openai_edits, openai_images
from hypergen.api.errors import envelope
from hypergen.api.multipart_form import MAX_PICTURES
from hypergen.api.native_paths import native_paths
from hypergen.api.schemas import PICTURE, SCHEMAS
from hypergen.images.encoding import FORMATS

_EXAMPLE_PROMPT = "a red circle on a blue background"
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
_EXAMPLE_STREAM = (
    "event: image_generation.completed\n"
    'data: {"type":"image_generation.completed","b64_json":"iVBORw0KGgo..."}\n\n'
)
DRAWING_ERRORS = (400, 401, 408, 413, 415, 429, 500, 503, 504, 507)


def generations() -> dict[str, Any]:
    body = _schema(openai_images.ImagesBody)
    example = {"prompt": _EXAMPLE_PROMPT, "size": "1024x1024", "seed": 7, "num_inference_steps": 30}
    return {
        "operationId": "createImage",
        "summary": "Draw pictures from a prompt",
        "tags": ["Images"],
        "requestBody": _body({"application/json": _media(body, example)}),
        "responses": _responses("ImagesResponse", streams=True),
    }


def edits() -> dict[str, Any]:
    return {
        "operationId": "createImageEdit",
        "summary": "Draw pictures from a picture and a prompt, all over or where a mask says",
        "tags": ["Images"],
        "requestBody": _body(_edit_media(_schema(openai_edits.EditBody))),
        "responses": _responses("ImagesResponse", streams=True),
    }


def variations() -> dict[str, Any]:
    body = _schema(openai_edits.EditBody)
    body["required"] = []
    media = {kind: content for kind, content in _edit_media(body).items() if kind.startswith("multipart")}
    return {
        "operationId": "createImageVariation",
        "summary": "Draw variations of a picture",
        "tags": ["Images"],
        "requestBody": _body(media),
        "responses": _responses("ImagesResponse", streams=True),
    }


def hyperbolic_generation() -> dict[str, Any]:
    """The operation of Hyperbolic's OpenAPI file v1, with its words, and what HyperGen answers beside."""
    example = {
        "model_name": "SDXL1.0-base",
        "prompt": "A photorealistic cyberpunk cat wearing sunglasses",
        "steps": 30,
        "cfg_scale": 7.5,
        "height": 1024,
        "width": 1024,
    }
    content = {
        "schema": _reference("ImageGenerationRequest"),
        "examples": {"SDXLBasic": {"summary": "Basic SDXL generation", "value": example}},
    }
    return {
        "operationId": "generateImage",
        "summary": "Hyperbolic Generate An Image",
        "description": "Generate one or more images from a text prompt using the specified diffusion model. "
        "Returns base64-encoded images in the `images` array.",
        "tags": ["Image Generation"],
        "requestBody": _body({"application/json": content}),
        "responses": _responses("ImageGenerationResponse", "Successful image generation"),
    }


def job(summary: str, operation_id: str, begins: bool = False) -> dict[str, Any]:
    """One route of jobs.

    Args:
        begins: it takes a body, and answers 202.
    """
    described: dict[str, Any] = {"operationId": operation_id, "summary": summary, "tags": ["Jobs"]}
    answer = {"description": summary, "content": {"application/json": {"schema": _reference("ImageJob")}}}
    if begins:
        described["requestBody"] = _body(_job_media())
    errors = DRAWING_ERRORS if begins else (401, 404)
    described["responses"] = {("202" if begins else "200"): answer, **_errors(errors)}
    return described


def told(operation_id: str, name: str, *statuses: int) -> dict[str, Any]:
    """A route that tells something: its answer's schema, with each of the statuses."""
    content = {"application/json": {"schema": _reference(name)}}
    responses = {str(status): {"description": name, "content": content} for status in statuses}
    return {"operationId": operation_id, "tags": ["Server"], "responses": responses}


def picture_file() -> dict[str, Any]:
    """The file behind a `url`."""
    file = {"schema": {"type": "string", "format": "binary"}}
    content = dict.fromkeys((kind.media_type for kind in FORMATS.values()), file)
    responses = {"200": {"description": "The file", "content": content}}
    return {"operationId": "getImageFile", "tags": ["Images"], "responses": responses}


def complete(schema: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's description with what all routes share: the key, the errors, the named schemas."""
    schema = deepcopy(schema)  # FastAPI keeps its own for the next time
    components = schema.setdefault("components", {})
    components["securitySchemes"] = {
        "BearerAuth": {"type": "http", "scheme": "bearer", "bearerFormat": "API Key"}
    }
    components["schemas"] = {**SCHEMAS, "ImageGenerationRequest": _schema(hyperbolic.GenerationBody)}
    schema["paths"] |= native_paths()
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # bad parameters are 400 here
            is_open = path in OPEN_PATHS or path.startswith(FILES_PREFIX)
            operation["security"] = [] if is_open else [{"BearerAuth": []}]
            statuses = {int(status) for status in operation["responses"]} - {200, 202}
            statuses |= ({404} if "{" in path else set()) | ({403} if is_open else {401, 403})
            if path not in OPEN_PATHS:
                # Also those that stand there already: FastAPI drops what is null from their examples.
                operation["responses"].update(_errors(tuple(sorted(statuses))))
    return schema


def _schema(body: type[BaseModel]) -> dict[str, Any]:
    return body.model_json_schema()


def _edit_media(body: dict[str, Any]) -> dict[str, Any]:
    """An edit's body as a form and as JSON."""
    fields, required = body["properties"], body.get("required", [])
    file = {"type": "string", "format": "binary"}
    files = {"type": "array", "items": file, "minItems": 1, "maxItems": MAX_PICTURES}
    form = {
        **body,
        "properties": {"image": files, "mask": file, **fields},
        "required": ["image", *required],
    }
    url = {"type": "string", "format": "data-url", "description": "data: URL with base64"}
    picture = {"type": "object", "properties": {"image_url": url}, "required": ["image_url"]}
    pictures = {"type": "array", "items": picture, "minItems": 1, "maxItems": MAX_PICTURES}
    in_json = {
        **body,
        "properties": {"images": pictures, "mask": picture, **fields},
        "required": ["images", *required],
    }
    example = {"prompt": _EXAMPLE_PROMPT, "images": [{"image_url": f"data:image/png;base64,{PICTURE}"}]}
    encoding = {name: {"contentType": "image/png, image/jpeg, image/webp"} for name in ("image", "mask")}
    return {
        "multipart/form-data": {"schema": form, "encoding": encoding},
        "application/json": _media(in_json, example),
    }


def _job_media() -> dict[str, Any]:
    """The bodies of all routes; which fields are there tells whose it is, and none of them streams."""
    media = _edit_media(_schema(openai_edits.EditBody))
    media["multipart/form-data"]["schema"]["required"] = ["image"]  # without a prompt it is a variation
    drawing, edit = _schema(openai_images.ImagesBody), media["application/json"]["schema"]
    edit["required"] = ["images"]
    for body in (drawing, edit, media["multipart/form-data"]["schema"]):
        body["properties"]["stream"] = {"type": "boolean", "enum": [False], "description": "no stream here"}
    either = {"anyOf": [drawing, _schema(hyperbolic.GenerationBody), edit]}
    media["application/json"] = _media(either, {"prompt": _EXAMPLE_PROMPT, "n": 10})
    return media


def _body(media: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": media}


def _media(schema: dict[str, Any], example: dict[str, Any]) -> dict[str, Any]:
    return {"schema": schema, "example": example}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _responses(name: str, description: str = "The pictures", streams: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _reference(name)}}
    if streams:
        content["text/event-stream"] = {"schema": _reference("ImagesStream"), "example": _EXAMPLE_STREAM}
    return {"200": {"description": description, "content": content}, **_errors(DRAWING_ERRORS)}


def _errors(statuses: tuple[int, ...]) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for status in statuses:
        title, meaning, param = _ERRORS[status]
        content = {"schema": _reference("ErrorResponse"), "example": envelope(status, meaning, param)}
        described[str(status)] = {"description": title, "content": {"application/json": content}}
    return described
