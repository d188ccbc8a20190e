"""OpenAI's response format of generations and edits: JSON, and server-sent events."""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field

from hypergen.api.errors import to_json
from hypergen.api.openapi import reference
from hypergen.api.progress_report import ProgressReport
from hypergen.api.validated_request import ValidatedRequest
from hypergen.events import ImageFinished, Preview
from hypergen.request import GenerationRequest, OutputFormat

EventPrefix = Literal["image_generation", "image_edit"]
# Side of an image token in `usage`, in pixels.
_TOKEN_SIDE = 16
_EXAMPLE_STREAM = (
    "event: image_generation.completed\n"
    'data: {"type":"image_generation.completed","b64_json":"iVBORw0KGgo..."}\n\n'
)


class ImageItem(BaseModel):
    b64_json: str | None = Field(None, description="image file, base64")
    url: str | None = Field(None, description="URL of the image file; needs no key")
    revised_prompt: str = Field(
        description="the unchanged prompt; if the model knows no word of it, what the model understood"
    )
    seed: int = Field(description="seed of this image")


class TokenDetails(BaseModel):
    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokenDetails
    output_tokens_details: TokenDetails


class ImagesResponse(BaseModel):
    created: int = Field(description="Unix time in seconds")
    data: list[ImageItem]
    size: str = Field(examples=["1024x1024"])
    quality: Literal["low", "medium", "high", "xhigh", "max"]
    background: Literal["opaque"]
    output_format: OutputFormat
    usage: Usage


class ImagesStream(BaseModel):
    """One event of the stream."""

    event: Literal[
        "image_generation.progress",
        "image_generation.partial_image",
        "image_generation.completed",
        "image_edit.progress",
        "image_edit.partial_image",
        "image_edit.completed",
        "error",
    ]
    data: str = Field(
        description="JSON: the image with its metadata, the progress, or the error",
        json_schema_extra={"contentMediaType": "application/json"},
    )


@dataclass(frozen=True)
class ImagesRequest(ValidatedRequest):
    """A validated request of OpenAI's API."""

    quality: str = "medium"
    image_tokens: int = 0  # of the input image


def to_response(
    validated: ImagesRequest, images: list[ImageFinished], urls: list[str] | None, created: int
) -> list[bytes]:
    """The response with `url`, with base64, or by default with both.

    Returns pieces of JSON; each image's base64 is a piece. Base64 needs no escaping, and scanning it in the
    json module would hold the GIL for 10 ms per 1024x1024 PNG. Run it in a thread: it takes milliseconds per
    megabyte.
    """
    request = validated.generation
    rest = {
        "created": created,
        "size": f"{request.width}x{request.height}",
        "quality": validated.quality,
        "background": "opaque",
        "output_format": request.output_format,
        "usage": usage(request, images[0].prompt_tokens, validated.image_tokens, request.n),
    }
    pieces = [to_json(rest)[:-1] + b',"data":[']
    for position, image in enumerate(images):
        item: dict[str, Any] = {
            "revised_prompt": validated.understood_prompt or request.prompt,
            "seed": image.seed,
        }
        if urls is not None:
            item["url"] = urls[position]
        separator = b"," if position else b""
        if validated.response_format == "url":
            pieces.append(separator + to_json(item))
        else:
            pieces += [separator + b'{"b64_json":"', base64.b64encode(image.data), b'",' + to_json(item)[1:]]
    return [*pieces, b"]}"]


def to_sse_event(
    prefix: EventPrefix,
    validated: ImagesRequest,
    created: int,
    event: Preview | ImageFinished | ProgressReport,
) -> list[bytes]:
    """One server-sent event in pieces; takes milliseconds per megabyte."""
    if isinstance(event, ProgressReport):
        name = f"{prefix}.progress"
        known = {field: value for field, value in asdict(event).items() if value is not None}
        return [f"event: {name}\ndata: ".encode(), to_json({"type": name, **known}), b"\n\n"]
    request = validated.generation
    body: dict[str, Any] = {
        "created_at": created,
        "size": f"{request.width}x{request.height}",
        "quality": validated.quality,
        "background": "opaque",
        "output_format": request.output_format,
    }
    if isinstance(event, Preview):
        name = f"{prefix}.partial_image"
        # `index` is our extension: OpenAI streams only one image per request.
        body |= {"partial_image_index": event.number, "index": event.index}
    else:
        name = f"{prefix}.completed"
        body |= {
            "usage": usage(request, event.prompt_tokens, validated.image_tokens, images=1),
            "seed": event.seed,
            "index": event.index,
        }
        if validated.understood_prompt is not None:
            body["revised_prompt"] = validated.understood_prompt
    start = f'event: {name}\ndata: {{"type":"{name}","b64_json":"'.encode()
    return [start, base64.b64encode(event.data), b'",' + to_json(body)[1:] + b"\n\n"]


def stream_media() -> dict[str, Any]:
    """The media type object of a stream in /openapi.json."""
    return {"schema": reference(ImagesStream), "example": _EXAMPLE_STREAM}


def image_tokens(width: int, height: int) -> int:
    """The number of squares of 16 x 16 pixels, including partial ones."""
    return -(-width // _TOKEN_SIDE) * -(-height // _TOKEN_SIDE)


def usage(
    request: GenerationRequest, text_tokens: int, input_image_tokens: int, images: int
) -> dict[str, Any]:
    """The `usage` object for a number of images.

    Args:
        text_tokens: of the prompt, counted by the model's tokenizer.
    """
    input_tokens = text_tokens + input_image_tokens
    output_tokens = image_tokens(request.width, request.height) * images
    return {
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "total_tokens": input_tokens + output_tokens,
        "input_tokens_details": {"text_tokens": text_tokens, "image_tokens": input_image_tokens},
        "output_tokens_details": {"text_tokens": 0, "image_tokens": output_tokens},
    }
