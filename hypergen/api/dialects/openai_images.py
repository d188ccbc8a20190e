"""OpenAI's images API with HyperGen's extensions: POST /v1/images/generations.

Source: OpenAI's OpenAPI file 2.3.0 and the HyperGen documents. docs/api.md describes the result.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictBool, StrictInt, StrictStr

from hypergen.api.dialects.endpoint import Endpoint
from hypergen.api.dialects.openai_answers import (
    ImagesRequest,
    ImagesResponse,
    ImagesStream,
    stream_media,
    to_response,
    to_sse_event,
)
from hypergen.api.loras import resolve_loras
from hypergen.api.openapi import EXAMPLE_PROMPT, media, request_body, responses
from hypergen.api.validation import (
    SMALLEST_SIDE,
    InputFile,
    LoraWeight,
    ModelFields,
    Number,
    Seed,
    capability_fields,
    check_prompt,
    check_steps,
    check_work,
    choose_seed,
    default_size,
    read_control,
    read_sampler,
    validate,
)
from hypergen.config import ServerSettings
from hypergen.errors import InvalidRequestError
from hypergen.images.geometry import Size
from hypergen.model_info import ModelInfo
from hypergen.request import GenerationRequest, OutputFormat

_SIZE = re.compile(r"([1-9][0-9]{1,4})x([1-9][0-9]{1,4})", re.ASCII)


def _read_guidance_scale(value: object) -> object:
    """diffusers' examples of distilled models have 0, by which they mean 1."""
    return 1.0 if value == 0 and not isinstance(value, bool) else value


class ImagesBody(ModelFields):
    """The body of a generation request. Unknown fields are ignored; null means absent."""

    prompt: StrictStr = Field(
        min_length=1, max_length=32000, description="text prompt", examples=["a red circle"]
    )
    model: StrictStr | None = Field(
        None,
        description="id or alias of a served model; a single model answers to every name",
    )
    n: StrictInt = Field(1, ge=1, le=10, description="number of images")
    size: StrictStr | None = Field(
        None,
        description="WIDTHxHEIGHT in pixels, multiples of 8, or `auto`; default: the model's size",
        examples=["1024x1024"],
    )
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] = Field(
        "auto", description="accepted, without effect; use `num_inference_steps`"
    )
    style: Literal["vivid", "natural"] | None = Field(None, description="accepted, without effect")
    background: Literal["auto", "opaque", "transparent"] = Field(
        "auto", description="images are opaque; `transparent` is not supported"
    )
    moderation: Literal["low", "auto"] = Field("auto", description="accepted, without effect")
    output_format: OutputFormat = Field("png", description="file format of the images")
    output_compression: StrictInt = Field(
        100, ge=0, le=100, description="quality of jpeg and webp; must be 100 for png, which is lossless"
    )
    response_format: Literal["url", "b64_json"] | None = Field(
        None, description="how images are returned; default: both"
    )
    stream: StrictBool = Field(False, description="respond with server-sent events")
    partial_images: StrictInt = Field(
        0, ge=0, le=3, description="number of previews per image; ignored without `stream`"
    )
    stream_progress: StrictBool = Field(
        False, description="with `stream`: events about the queue and the steps, too"
    )
    user: StrictStr | None = Field(None, description="accepted, ignored")
    safety_identifier: StrictStr | None = Field(None, description="accepted, ignored")
    negative_prompt: StrictStr | None = Field(None, max_length=32000, description="negative prompt")
    num_inference_steps: StrictInt | None = Field(
        None, ge=1, le=150, description="denoising steps; default: the model's"
    )
    guidance_scale: Annotated[Number | None, BeforeValidator(_read_guidance_scale)] = Field(
        None,
        ge=1,
        le=20,
        description="guidance scale; 1 is no guidance, and 0 as in diffusers, too; default: the model's",
    )
    seed: Seed = Field(
        None,
        description="image i uses seed + i; the same seed gives the same bytes; -1 or absent: random",
    )
    strength: Number | None = Field(
        None,
        ge=0,
        le=1,
        description="how much the input image may change; ignored without one; default: 0.7, with a mask 1",
    )
    control_image: InputFile | None = Field(None, description="control image, base64 or a data: URL")
    control_model: StrictStr | None = Field(None, description="name of a ControlNet of this server")
    lora_path: StrictStr | None = Field(
        None,
        description="a LoRA of this server: its name, or its path inside a LoRA folder; default: the LoRA of "
        "the server's settings, if any",
    )
    lora_scale: Number = Field(1.0, ge=0, le=2, description="weight of that LoRA; 0 is the base model")
    loras: dict[StrictStr, LoraWeight] | None = Field(
        None,
        description="several LoRAs instead of `lora_path`: name or path -> weight; {} is the base model",
        examples=[{"Pixel_Art": 0.8, "Crayons": 0.5}],
    )


def to_request(
    body: dict[str, Any], model_info: ModelInfo, settings: ServerSettings, request_id: str
) -> ImagesRequest:
    """Validate a body and resolve its defaults.

    Raises:
        InvalidRequestError: `param` names the field.
    """
    return resolve(validate(ImagesBody, body), model_info, settings, request_id)


def resolve(
    fields: ImagesBody,
    model_info: ModelInfo,
    settings: ServerSettings,
    request_id: str,
    size: Size | None = None,
) -> ImagesRequest:
    """Resolve the defaults of a body with valid types and ranges, and check the rest.

    Args:
        size: width and height that replace the body's.

    Raises:
        InvalidRequestError: `param` names the field.
    """
    check_prompt(fields.prompt)
    if fields.background == "transparent":
        raise InvalidRequestError(
            "'background' must be 'auto' or 'opaque': images have no transparency.", param="background"
        )
    if fields.output_format == "png" and fields.output_compression != 100:
        raise InvalidRequestError(
            "'output_compression' must be 100 for png, which is lossless; use 'jpeg' or 'webp'.",
            param="output_compression",
        )

    defaults = model_info.defaults
    width, height = size or _size(fields.size, model_info, settings.max_side)
    default_steps = min(defaults.num_inference_steps, settings.max_steps)
    num_inference_steps = fields.num_inference_steps or default_steps
    check_steps(num_inference_steps, settings.max_steps, "num_inference_steps")
    guidance_scale = defaults.guidance_scale if fields.guidance_scale is None else fields.guidance_scale
    sampler = read_sampler(
        fields.sampler, fields.scheduler, num_inference_steps, model_info, "num_inference_steps"
    )
    loras = _loras(fields, model_info)
    check_work(fields.n, num_inference_steps, width, height, settings.max_megapixel_steps)
    params = ("control_image", "control_model")
    return ImagesRequest(
        generation=GenerationRequest(
            id=request_id,
            model=model_info.id,
            prompt=fields.prompt,
            width=width,
            height=height,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=choose_seed(fields.seed, fields.n),
            seed_given=fields.seed is not None,
            n=fields.n,
            sampler=sampler,
            loras=loras,
            control=read_control(
                fields, fields.control_image, fields.control_model, params, (width, height), model_info
            ),
            **capability_fields(fields, fields.negative_prompt, model_info),
            output_format=fields.output_format,
            output_compression=fields.output_compression,
            partial_images=fields.partial_images if fields.stream else 0,
            metadata=settings.image_metadata,
        ),
        client_fields={"loras": "loras" if fields.lora_path is None else "lora_path"},
        response_format=fields.response_format,
        stream=fields.stream,
        stream_progress=fields.stream_progress,
        quality={"auto": "medium", "standard": "medium", "hd": "high"}.get(fields.quality, fields.quality),
    )


def _size(size: str | None, model_info: ModelInfo, max_side: int) -> tuple[int, int]:
    if size is None or size == "auto":
        return default_size(model_info, max_side)
    match = _SIZE.fullmatch(size)
    if match is None:
        raise InvalidRequestError(
            f"Invalid size format: {size[:40]}. Use format like '1024x1024'",
            param="size",
            code="invalid_size",
        )
    width, height = int(match[1]), int(match[2])
    if width % 8 or height % 8:
        raise InvalidRequestError(
            f"'size' must have a width and height divisible by 8, not {size}.", param="size"
        )
    if not (min(width, height) >= SMALLEST_SIDE and max(width, height) <= max_side):
        raise InvalidRequestError(
            f"'size' must be between {SMALLEST_SIDE} and {max_side} pixels in width and height, not {size}.",
            param="size",
        )
    return width, height


def _loras(fields: ImagesBody, model_info: ModelInfo) -> tuple[tuple[str, float], ...]:
    if fields.loras is not None:
        if fields.lora_path is not None:
            raise InvalidRequestError("'loras' and 'lora_path' cannot be combined.", param="loras")
        return resolve_loras(fields.loras, model_info, "loras")
    lora = model_info.default_lora if fields.lora_path is None else fields.lora_path
    return () if lora is None else resolve_loras({lora: fields.lora_scale}, model_info, "lora_path")


_EXAMPLE = {"prompt": EXAMPLE_PROMPT, "size": "1024x1024", "seed": 7, "num_inference_steps": 30}
GENERATIONS = Endpoint(
    path="/v1/images/generations",
    model_field="model",
    image_fields=frozenset({"control_image"}),
    claims=lambda body, is_form: not is_form,
    body=ImagesBody,
    to_request=to_request,
    validated=ImagesRequest,
    to_response=to_response,
    to_sse_event=partial(to_sse_event, "image_generation"),
    openapi={
        "operationId": "createImage",
        "summary": "Generate images from a prompt",
        "tags": ["Images"],
        "requestBody": request_body({"application/json": media(ImagesBody.model_json_schema(), _EXAMPLE)}),
        "responses": responses(ImagesResponse, "The images", stream_media()),
    },
    schemas=(ImagesResponse, ImagesStream),
)
