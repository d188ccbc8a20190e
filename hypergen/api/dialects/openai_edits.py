"""OpenAI's edits and variations: POST /v1/images/edits as a form or JSON, and /v1/images/variations.

Both generate from an input image; `openai_images` has the parts that they share with generations.
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

# The prompt of variations.
NEUTRAL_PROMPT = "a picture"
_DEFAULT_STRENGTH = 0.7
# Keys of an image's object in JSON.
_SOURCES = ("image_url", "url", "b64_json")


class EditBody(openai_images.ImagesBody):
    """The fields of an edit without its images."""

    input_fidelity: Literal["high", "low"] | None = Field(
        None, description="accepted, without effect; use `strength`"
    )


def to_edit(
    body: dict[str, Any], model_info: ModelInfo, settings: ServerSettings, request_id: str
) -> ImagesRequest:
    """Validate an edit and decode its images, which is slow, so run it in a thread.

    Args:
        body: JSON with `images` and `mask`, or a parsed form with the files `image` and `mask`.

    Raises:
        InvalidRequestError: `param` names the field.
    """
    fields = validate(EditBody, body)
    if "markup" in body:
        raise InvalidRequestError("'markup' is not supported; describe it in the prompt.", param="markup")
    files, param = _input_files(body)
    check_capability("image", param, model_info)
    if "mask" in body:
        check_capability("mask", "mask", model_info)
    masks = _input_masks(body, len(files))
    for file in files[1:]:
        check_header(file, param)
    image = decode(files[0], param)
    image_size = request_size_of(image.size, SMALLEST_SIDE, settings.max_side)
    validated = openai_images.resolve(
        fields, model_info, settings, request_id, image_size if fields.size in (None, "auto") else None
    )
    size = (validated.generation.width, validated.generation.height)
    mask = _read_mask(masks[0], image) if masks else None
    default_strength = _DEFAULT_STRENGTH if mask is None else 1.0
    generation = replace(
        validated.generation,
        image=to_input_image(image, *size),
        mask=None if mask is None else to_mask(mask, *size),
        strength=default_strength if fields.strength is None else fields.strength,
    )
    return replace(validated, generation=generation, image_tokens=image_tokens(*size))


def to_variation(
    body: dict[str, Any], model_info: ModelInfo, settings: ServerSettings, request_id: str
) -> ImagesRequest:
    """Validate a variation: an edit with a neutral prompt. A mask is validated but ignored."""
    for mask in _input_masks(body, MAX_INPUT_IMAGES):
        check_header(mask, "mask")
    without_mask = {name: value for name, value in body.items() if name != "mask"}
    return to_edit({"prompt": NEUTRAL_PROMPT, **without_mask}, model_info, settings, request_id)


def _input_files(body: dict[str, Any]) -> tuple[list[bytes], str]:
    """The files of the input images, and the name of their field."""
    param = "image" if "image" in body else "images"
    if "images" in body and "image" in body:
        raise InvalidRequestError("Send either 'images' or 'image'.", param="image")
    value: object = body.get(param, [])
    if value == []:
        message = "The field 'image' (in JSON: 'images') is required."
        raise InvalidRequestError(message, param=param, code="missing_required_parameter")
    values = cast(list[object], value) if isinstance(value, list) else [value]
    if not 1 <= len(values) <= MAX_INPUT_IMAGES:
        raise InvalidRequestError(f"'{param}' must have 1 to {MAX_INPUT_IMAGES} images.", param=param)
    return [_file(item, param) for item in values], param


def _input_masks(body: dict[str, Any], images: int) -> list[bytes]:
    """The files of the masks; the first is for the first input image, and further ones are not used.

    Args:
        images: number of input images, of which each may have a mask.
    """
    value: object = body.get("mask", [])
    values = cast(list[object], value) if isinstance(value, list) else [value]
    masks = [_file(item, "mask") for item in values[: MAX_INPUT_IMAGES + 1]]
    masks = masks[:1] if len(set(masks)) == 1 else masks
    if len(masks) > images:
        raise InvalidRequestError("'mask' has more masks than there are input images.", param="mask")
    for mask in masks[1:]:
        check_header(mask, "mask")
    return masks


def _file(value: object, param: str) -> bytes:
    """The bytes of a file in a form, or of an object with base64 or a data: URL in JSON.

    Objects are `{"image_url": ...}`, as text or as `{"url": ...}`, `{"url": ...}` and `{"b64_json": ...}`.
    """
    if isinstance(value, dict):
        keys = cast(dict[str, object], value)
        if keys.get("file_id") is not None:
            raise InvalidRequestError(
                f"'{param}' must contain the image itself; 'file_id' is not supported.", param=param
            )
        sources = [keys[name] for name in _SOURCES if keys.get(name) is not None]
        if len(sources) > 1:
            raise InvalidRequestError(
                f"'{param}' must contain one of {', '.join(_SOURCES)} per image.", param=param
            )
        value = sources[0] if sources else None
        if isinstance(value, dict):
            value = cast(dict[str, object], value).get("url")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return from_base64(value, param)
    raise InvalidRequestError(
        f'\'{param}\' must contain images: files in a form, {{"image_url": "data:..."}} in JSON.', param=param
    )


def _read_mask(data: bytes, image: Image) -> Image:
    mask = decode(data, "mask")
    if mask.size != image.size:
        sizes = [f"{width}x{height}" for width, height in (mask.size, image.size)]
        raise InvalidRequestError(
            f"'mask' must have the size of the input image, {sizes[1]}, not {sizes[0]}.", param="mask"
        )
    return mask


def _content(required: list[str]) -> dict[str, Any]:
    """The body as a form and as JSON.

    Args:
        required: required fields, without the images.
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
    nested = {"anyOf": [url, {"type": "object", "properties": {"url": url}, "required": ["url"]}]}
    sources = {"image_url": nested, "url": url, "b64_json": {"type": "string", "description": "base64"}}
    image = {
        "type": "object",
        "properties": sources,
        "oneOf": [{"required": [name]} for name in sources],
    }
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
    body=EditBody,
    accepts_forms=True,
    to_request=to_edit,
    validated=ImagesRequest,
    to_response=to_response,
    to_sse_event=partial(to_sse_event, "image_edit"),
    openapi={
        "operationId": "createImageEdit",
        "summary": "Edit an image with a prompt, optionally only inside a mask",
        "tags": ["Images"],
        "requestBody": request_body(_content(["prompt"])),
        "responses": responses(ImagesResponse, "The images", stream_media()),
    },
    schemas=(ImagesResponse, ImagesStream),
)
VARIATIONS = Endpoint(
    path="/v1/images/variations",
    model_field="model",
    image_fields=_IMAGE_FIELDS,
    claims=lambda body, is_form: is_form or "images" in body,
    body=EditBody,
    accepts_forms=True,
    to_request=to_variation,
    validated=ImagesRequest,
    to_response=to_response,
    to_sse_event=partial(to_sse_event, "image_edit"),
    openapi={
        "operationId": "createImageVariation",
        "summary": "Generate variations of an image",
        "tags": ["Images"],
        "requestBody": request_body(_content([])),
        "responses": responses(ImagesResponse, "The images", stream_media()),
    },
    schemas=(ImagesResponse, ImagesStream),
)
