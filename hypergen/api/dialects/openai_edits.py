"""OpenAI's edits and variations: POST /v1/images/edits as a form or JSON, and /v1/images/variations.

Both are generations from a picture; what they share with those is in `openai_images`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

from PIL.Image import Image
from pydantic import Field

from hypergen.api.dialects import openai_images
from hypergen.api.dialects.endpoint import Endpoint
from hypergen.api.dialects.openai_answers import (
    ImagesRequest,
    ImagesResponse,
    ImagesStream,
    image_tokens,
    stream_media,
    to_response,
    to_sse_event,
)
from hypergen.api.multipart_form import MAX_INPUT_IMAGES
from hypergen.api.openapi import EXAMPLE_IMAGE, EXAMPLE_PROMPT, media, request_body, responses
from hypergen.api.validation import SMALLEST_SIDE, check_capability, validate
from hypergen.config import ServerSettings
from hypergen.errors import InvalidRequestError
from hypergen.images.decoding import check_header, decode, from_base64, to_input_image, to_mask
from hypergen.images.geometry import request_size_of
from hypergen.model_info import ModelInfo

# A variation has no prompt of its own.
NEUTRAL_PROMPT = "a picture"
_STRENGTH = 0.7


class EditBody(openai_images.ImagesBody):
    """What an edit has beside its pictures: the fields of a generation and a few of its own."""

    input_fidelity: Literal["high", "low"] | None = Field(
        None, description="accepted, without effect: `strength` says how much may change"
    )


def to_edit(
    body: dict[str, Any], description: ModelInfo, settings: ServerSettings, request_id: str
) -> ImagesRequest:
    """Check an edit and read its pictures; takes as long as decoding them, so it belongs into a thread.

    Args:
        body: JSON with `images` and `mask`, or a form with the files `image` and `mask`.

    Raises:
        InvalidRequestError: `param` names the field.
    """
    asked = validate(EditBody, body)
    if "markup" in body:
        raise InvalidRequestError("'markup' is not read; say it in the prompt.", param="markup")
    sources, param = _pictures(body)
    check_capability("image", param, description)
    if "mask" in body:
        check_capability("mask", "mask", description)
    for source in sources[1:]:
        check_header(source, param)
    image = decode(sources[0], param)
    own_size = request_size_of(image.size, SMALLEST_SIDE, settings.max_side)
    drawing = openai_images.resolve(
        asked, description, settings, request_id, own_size if asked.size in (None, "auto") else None
    )
    size = (drawing.generation.width, drawing.generation.height)
    mask = _read_mask(body["mask"], image) if "mask" in body else None
    usual = _STRENGTH if mask is None else 1.0
    generation = replace(
        drawing.generation,
        image=to_input_image(image, *size),
        mask=None if mask is None else to_mask(mask, *size),
        strength=usual if asked.strength is None else asked.strength,
    )
    return replace(drawing, generation=generation, image_tokens=image_tokens(*size))


def to_variation(
    body: dict[str, Any], description: ModelInfo, settings: ServerSettings, request_id: str
) -> ImagesRequest:
    """Check a variation, which is an edit with a neutral prompt; a mask is looked at, and not used."""
    if "mask" in body:
        check_header(_file(body["mask"], "mask"), "mask")
    fields = {name: value for name, value in body.items() if name != "mask"}
    return to_edit({"prompt": NEUTRAL_PROMPT, **fields}, description, settings, request_id)


def _pictures(body: dict[str, Any]) -> tuple[list[bytes], str]:
    """The files of the pictures, and the name of the field that they came in."""
    param = "image" if "image" in body else "images"
    if "images" in body and "image" in body:
        raise InvalidRequestError("Send either 'images' or 'image'.", param="image")
    given: object = body.get(param, [])
    if given == []:
        message = "The field 'image' (in JSON: 'images') is required."
        raise InvalidRequestError(message, param=param, code="missing_required_parameter")
    pictures = cast(list[object], given) if isinstance(given, list) else [given]
    if not 1 <= len(pictures) <= MAX_INPUT_IMAGES:
        raise InvalidRequestError(f"'{param}' must be 1 to {MAX_INPUT_IMAGES} images.", param=param)
    return [_file(picture, param) for picture in pictures], param


def _file(picture: object, param: str) -> bytes:
    """The bytes of a form's file, or of JSON's `{"image_url": "data:..."}`."""
    if isinstance(picture, dict):
        keys = cast(dict[str, object], picture)
        picture = keys.get("image_url")
        if keys.get("file_id") is not None:
            raise InvalidRequestError(
                f"'{param}' must hold the image itself: 'file_id' is not known here.", param=param
            )
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str):
        return from_base64(picture, param)
    raise InvalidRequestError(
        f'\'{param}\' must hold images: files in a form, {{"image_url": "data:..."}} in JSON.', param=param
    )


def _read_mask(value: object, image: Image) -> Image:
    mask = decode(_file(value, "mask"), "mask")
    if mask.size != image.size:
        sizes = [f"{width}x{height}" for width, height in (mask.size, image.size)]
        raise InvalidRequestError(f"'mask' is {sizes[0]} and the input image {sizes[1]}.", param="mask")
    return mask


def _content(required: list[str]) -> dict[str, Any]:
    """The body as a form and as JSON.

    Args:
        required: fields beside the images.
    """
    body = EditBody.model_json_schema()
    fields = body["properties"]
    file = {"type": "string", "format": "binary"}
    files = {"type": "array", "items": file, "minItems": 1, "maxItems": MAX_INPUT_IMAGES}
    form = {
        **body,
        "properties": {"image": files, "mask": file, **fields},
        "required": ["image", *required],
    }
    url = {"type": "string", "format": "data-url", "description": "data: URL with base64"}
    image = {"type": "object", "properties": {"image_url": url}, "required": ["image_url"]}
    images = {"type": "array", "items": image, "minItems": 1, "maxItems": MAX_INPUT_IMAGES}
    in_json = {
        **body,
        "properties": {"images": images, "mask": image, **fields},
        "required": ["images", *required],
    }
    example = {"prompt": EXAMPLE_PROMPT, "images": [{"image_url": f"data:image/png;base64,{EXAMPLE_IMAGE}"}]}
    encoding = {name: {"contentType": "image/png, image/jpeg, image/webp"} for name in ("image", "mask")}
    return {
        "multipart/form-data": {"schema": form, "encoding": encoding},
        "application/json": media(in_json, example),
    }


_IMAGE_FIELDS = frozenset({"image", "images", "mask", "control_image"})
EDITS = Endpoint(
    path="/v1/images/edits",
    model_field="model",
    image_fields=_IMAGE_FIELDS,
    claims=lambda body, is_form: (is_form or "images" in body) and "prompt" in body,
    form=EditBody,
    to_request=to_edit,
    to_response=to_response,
    to_sse_event=partial(to_sse_event, "image_edit"),
    openapi={
        "operationId": "createImageEdit",
        "summary": "Draw pictures from a picture and a prompt, all over or where a mask says",
        "tags": ["Images"],
        "requestBody": request_body(_content(["prompt"])),
        "responses": responses(ImagesResponse, "The pictures", stream_media()),
    },
    schemas=(ImagesResponse, ImagesStream),
)
VARIATIONS = Endpoint(
    path="/v1/images/variations",
    model_field="model",
    image_fields=_IMAGE_FIELDS,
    claims=lambda body, is_form: is_form or "images" in body,
    form=EditBody,
    to_request=to_variation,
    to_response=to_response,
    to_sse_event=partial(to_sse_event, "image_edit"),
    openapi={
        "operationId": "createImageVariation",
        "summary": "Draw variations of a picture",
        "tags": ["Images"],
        "requestBody": request_body(_content([])),
        "responses": responses(ImagesResponse, "The pictures", stream_media()),
    },
    schemas=(ImagesResponse, ImagesStream),
)
