"""OpenAI's answers: images of generations and edits as JSON, and as the events of a stream."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field

from hypergen.api.errors import to_json
from hypergen.api.openapi import reference
from hypergen.api.validation import ValidatedRequest
from hypergen.events import ImageFinished, Preview
from hypergen.request import GenerationRequest, OutputFormat

Kind = Literal["image_generation", "image_edit"]
# Side of one image token, as `usage` counts them, in pixels.
_TOKEN_SIDE = 16
_EXAMPLE_STREAM = (
    "event: image_generation.completed\n"
    'data: {"type":"image_generation.completed","b64_json":"iVBORw0KGgo..."}\n\n'
)


class ImageItem(BaseModel):
    b64_json: str | None = Field(None, description="the file, base64")
    url: str | None = Field(None, description="where the file is, without a key")
    revised_prompt: str = Field(description="the prompt as it was sent")
    seed: int = Field(description="generates this image alone")


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
    created: int = Field(description="seconds since 1970")
    data: list[ImageItem]
    size: str = Field(examples=["1024x1024"])
    quality: Literal["low", "medium", "high", "xhigh", "max"]
    background: Literal["opaque"]
    output_format: OutputFormat
    usage: Usage


class ImagesStream(BaseModel):
    """One event of the stream."""

    event: Literal[
        "image_generation.partial_image",
        "image_generation.completed",
        "image_edit.partial_image",
        "image_edit.completed",
        "error",
    ]
    data: str = Field(
        description="JSON: the image and what belongs to it, or the error",
        json_schema_extra={"contentMediaType": "application/json"},
    )


@dataclass(frozen=True)
class ImagesRequest(ValidatedRequest):
    """A checked request for OpenAI's answer."""

    quality: str = "medium"
    image_tokens: int = 0  # of the pictures that were sent


def to_response(
    asked: ImagesRequest, images: list[ImageFinished], urls: list[str] | None, created: int
) -> list[bytes]:
    """The answer: with `url`s, with base64, or with both when the client did not say.

    JSON in pieces, of which a picture is one: base64 needs no escaping, and the JSON module, looking for what
    does, would hold the interpreter's lock for 10 ms per 1024x1024 PNG, and with it the event loop. Still
    takes milliseconds per megabyte, so it belongs into a thread.
    """
    request = asked.generation
    answer = {
        "created": created,
        "size": f"{request.width}x{request.height}",
        "quality": asked.quality,
        "background": "opaque",
        "output_format": request.output_format,
        "usage": usage(request, images[0].prompt_tokens, asked.image_tokens, request.n),
    }
    pieces = [to_json(answer)[:-1] + b',"data":[']
    for position, image in enumerate(images):
        item: dict[str, Any] = {"revised_prompt": request.prompt, "seed": image.seed}
        if urls is not None:
            item["url"] = urls[position]
        separator = b"," if position else b""
        if asked.response_format == "url":
            pieces.append(separator + to_json(item))
        else:
            pieces += [separator + b'{"b64_json":"', base64.b64encode(image.data), b'",' + to_json(item)[1:]]
    return [*pieces, b"]}"]


def to_sse_event(
    kind: Kind, asked: ImagesRequest, created: int, event: Preview | ImageFinished
) -> list[bytes]:
    """One event as it is sent, in pieces; takes milliseconds per megabyte."""
    request = asked.generation
    body: dict[str, Any] = {
        "created_at": created,
        "size": f"{request.width}x{request.height}",
        "quality": asked.quality,
        "background": "opaque",
        "output_format": request.output_format,
    }
    if isinstance(event, Preview):
        name = f"{kind}.partial_image"
        # OpenAI's previews belong to one picture; `index` tells of which, where several were asked for.
        body |= {"partial_image_index": event.number, "index": event.index}
    else:
        name = f"{kind}.completed"
        body |= {
            "usage": usage(request, event.prompt_tokens, asked.image_tokens, images=1),
            "seed": event.seed,
            "index": event.index,
        }
    start = f'event: {name}\ndata: {{"type":"{name}","b64_json":"'.encode()
    return [start, base64.b64encode(event.data), b'",' + to_json(body)[1:] + b"\n\n"]


def stream_media() -> dict[str, Any]:
    """A stream in /openapi.json."""
    return {"schema": reference(ImagesStream), "example": _EXAMPLE_STREAM}


def image_tokens(width: int, height: int) -> int:
    """Squares of 16 x 16 pixels, those at the edges too."""
    return -(-width // _TOKEN_SIDE) * -(-height // _TOKEN_SIDE)


def usage(request: GenerationRequest, text_tokens: int, sent_tokens: int, images: int) -> dict[str, Any]:
    """What so many pictures of a request count as; `text_tokens` by the model's tokenizer."""
    input_tokens = text_tokens + sent_tokens
    output_tokens = image_tokens(request.width, request.height) * images
    return {
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "total_tokens": input_tokens + output_tokens,
        "input_tokens_details": {"text_tokens": text_tokens, "image_tokens": sent_tokens},
        "output_tokens_details": {"text_tokens": 0, "image_tokens": output_tokens},
    }
