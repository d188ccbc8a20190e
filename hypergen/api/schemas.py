"""The named schemas of /openapi.json: what the server answers."""

from __future__ import annotations

from typing import Any

from hypergen.api.errors import envelope

# A red square of 8 x 8 pixels, as base64 of a PNG.
PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGP8z4AdMOEQH6QSAM1BAQ/oQeJvAAAAAElFTkSuQmCC"
)
_TEXT = {"type": "string"}
_INTEGER = {"type": "integer"}
_TOKENS = {
    "type": "object",
    "properties": {"text_tokens": _INTEGER, "image_tokens": _INTEGER},
    "required": ["text_tokens", "image_tokens"],
}
_MODEL = {"id": _TEXT, "object": {"type": "string", "const": "model"}, "created": _INTEGER, "owned_by": _TEXT}
_EVENTS = (
    "image_generation.partial_image",
    "image_generation.completed",
    "image_edit.partial_image",
    "image_edit.completed",
)
_ERROR = {
    "message": _TEXT,
    "type": _TEXT,
    "param": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "code": _TEXT,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "ErrorResponse": {
        "type": "object",
        "properties": {
            "error": {"type": "object", "properties": _ERROR, "required": list(_ERROR)},
            "detail": {"type": "string", "description": "the message again"},
        },
        "required": ["error", "detail"],
        "example": envelope(400, "'n' should be less than or equal to 10.", "n", "invalid_value"),
    },
    "ImagesResponse": {
        "type": "object",
        "properties": {
            "created": {"type": "integer", "description": "seconds since 1970"},
            "data": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "b64_json": {"type": "string", "description": "the file, base64"},
                        "url": {"type": "string", "description": "where the file is, without a key"},
                        "revised_prompt": {"type": "string", "description": "the prompt as it was sent"},
                        "seed": {"type": "integer", "description": "draws this picture alone"},
                    },
                    "required": ["revised_prompt", "seed"],
                },
            },
            "size": {"type": "string", "example": "1024x1024"},
            "quality": {"type": "string", "enum": ["low", "medium", "high", "xhigh", "max"]},
            "background": {"type": "string", "const": "opaque"},
            "output_format": {"type": "string", "enum": ["png", "jpeg", "webp"]},
            "usage": {
                "type": "object",
                "properties": {
                    "input_tokens": _INTEGER,
                    "output_tokens": _INTEGER,
                    "total_tokens": _INTEGER,
                    "input_tokens_details": _TOKENS,
                    "output_tokens_details": _TOKENS,
                },
                "required": ["input_tokens", "output_tokens", "total_tokens", "input_tokens_details"],
            },
        },
        "required": ["created", "data", "size", "quality", "background", "output_format", "usage"],
    },
    "ImagesStream": {
        "type": "object",
        "description": "one event of the stream",
        "properties": {
            "event": {
                "type": "string",
                "enum": [*_EVENTS, "error"],
            },
            "data": {
                "type": "string",
                "description": "JSON: the picture and what belongs to it, or the error",
                "contentMediaType": "application/json",
            },
        },
        "required": ["event", "data"],
    },
    "ImageGenerationResponse": {
        "type": "object",
        "properties": {
            "images": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "image": {"type": "string", "description": "Base64-encoded image bytes."},
                        "seed": _INTEGER,
                    },
                    "required": ["image", "seed"],
                },
            },
            "inference_time": {"type": "number", "description": "Seconds spent in inference."},
        },
        "required": ["images", "inference_time"],
    },
    "Model": {"type": "object", "properties": _MODEL, "required": list(_MODEL)},
    "ModelList": {
        "type": "object",
        "properties": {
            "object": {"type": "string", "const": "list"},
            "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
        },
        "required": ["object", "data"],
    },
    "Health": {
        "type": "object",
        "properties": {
            "status": {
                "type": "string",
                "enum": ["healthy", "loading", "recovering", "draining", "failed"],
            },
            "model": {"type": "string", "description": "the first of the models"},
            "models": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "id": _TEXT,
                        "aliases": {"type": "array", "items": _TEXT},
                        "in_memory": {"type": "boolean"},
                    },
                    "required": ["id", "aliases", "in_memory"],
                },
            },
            "device": _TEXT,
            "queue_size": {"type": "integer", "description": "requests accepted and unfinished"},
        },
        "required": ["status", "model", "models", "device", "queue_size"],
    },
    "ImageJob": {
        "type": "object",
        "properties": {
            "id": _TEXT,
            "object": {"type": "string", "const": "image.job"},
            "status": {"type": "string", "enum": ["queued", "running", "succeeded", "failed", "cancelled"]},
            "created": {"type": "integer", "description": "seconds since 1970"},
            "position": {"type": "integer", "description": "waiting requests that came before"},
            "progress": {
                "type": "object",
                "properties": {"step": _INTEGER, "steps": _INTEGER},
                "required": ["step", "steps"],
            },
            "expected_s": {"type": "number", "description": "seconds until it is done, estimated"},
            "result": {"type": "object", "description": "the answer that the request would have had"},
            "error": {"type": "object", "properties": {**_ERROR, "status": _INTEGER}},
        },
        "required": ["id", "object", "status", "created"],
    },
}
