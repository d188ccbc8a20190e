"""OpenAI's images API with HyperGen's extensions: POST /v1/images/generations.

Source: OpenAI's OpenAPI description 2.3.0 and the HyperGen documents; docs/api.md says what counts.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr

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
    MAX_SEED,
    SMALLEST_SIDE,
    LoraWeight,
    ModelFields,
    Number,
    SentFile,
    check_prompt,
    check_steps,
    check_work,
    choose_seed,
    default_size,
    model_fields,
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


class ImagesBody(ModelFields):
    """The body of a generation request. Unknown fields are ignored, and null counts as not given."""

    prompt: StrictStr = Field(
        min_length=1, max_length=32000, description="what to draw", examples=["a red circle"]
    )
    model: StrictStr | None = Field(
        None,
        description="id or alias of one of the models in /v1/models; any other name is the first",
    )
    n: StrictInt = Field(1, ge=1, le=10, description="how many pictures")
    size: StrictStr | None = Field(
        None,
        description="width x height in pixels, multiples of 8, or `auto` for the model's native size; "
        "absent: the model's default",
        examples=["1024x1024"],
    )
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] = Field(
        "auto", description="accepted, without effect: `num_inference_steps` sets the quality"
    )
    style: Literal["vivid", "natural"] | None = Field(None, description="accepted, without effect")
    background: Literal["auto", "opaque", "transparent"] = Field(
        "auto", description="pictures are opaque; `transparent` is refused"
    )
    moderation: Literal["low", "auto"] = Field("auto", description="accepted, without effect")
    output_format: OutputFormat = Field("png", description="file format of the pictures")
    output_compression: StrictInt = Field(
        100, ge=0, le=100, description="quality of jpeg and webp; png is lossless and takes only 100"
    )
    response_format: Literal["url", "b64_json"] | None = Field(
        None, description="where the pictures are in the answer; absent: in both places"
    )
    stream: StrictBool = Field(False, description="answer with server-sent events")
    partial_images: StrictInt = Field(
        0, ge=0, le=3, description="previews of each picture in a stream; without one no effect"
    )
    user: StrictStr | None = Field(None, description="accepted, not kept")
    safety_identifier: StrictStr | None = Field(None, description="accepted, not kept")
    negative_prompt: StrictStr | None = Field(None, max_length=32000, description="what not to draw")
    num_inference_steps: StrictInt | None = Field(
        None, ge=1, le=150, description="denoising steps; absent: the model's default"
    )
    guidance_scale: Number | None = Field(
        None,
        ge=1,
        le=20,
        description="how closely to follow the prompt, 1 is no guidance; absent: the model's default",
    )
    seed: StrictInt | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description="the same seed gives the same bytes; picture i has seed + i; absent: drawn",
    )
    sampler: StrictStr | None = Field(
        None, description="one of the samplers in /health; absent: the model's own"
    )
    strength: Number | None = Field(
        None,
        ge=0,
        le=1,
        description="how much of a sent picture may change, without one no effect; "
        "absent: 0.7, with a mask 1",
    )
    control_image: SentFile | None = Field(
        None, description="picture that a control model follows, base64 or a data: URL"
    )
    control_model: StrictStr | None = Field(None, description="name of a control model of this server")
    lora_path: StrictStr | None = Field(
        None,
        description="a LoRA of this server: its name, or its path inside a LoRA folder; absent: the server's "
        "default, if it has one",
    )
    lora_scale: Number = Field(1.0, ge=0, le=2, description="strength of that LoRA; 0 is the base model")
    loras: dict[StrictStr, LoraWeight] | None = Field(
        None,
        description="several LoRAs: name or path to strength, instead of `lora_path`; {} is the base model",
        examples=[{"Pixel_Art": 0.8, "Crayons": 0.5}],
    )


def to_request(
    body: dict[str, Any], description: ModelInfo, settings: ServerSettings, request_id: str
) -> ImagesRequest:
    """Check a body and resolve its defaults.

    Raises:
        InvalidRequestError: `param` names the field.
    """
    return resolve(validate(ImagesBody, body), description, settings, request_id)


def resolve(
    asked: ImagesBody,
    description: ModelInfo,
    settings: ServerSettings,
    request_id: str,
    size: Size | None = None,
) -> ImagesRequest:
    """Resolve the defaults of a body whose types and ranges are right, and check the rest.

    Args:
        size: in place of the body's.

    Raises:
        InvalidRequestError: `param` names the field.
    """
    check_prompt(asked.prompt)
    if asked.background == "transparent":
        raise InvalidRequestError(
            "'background' must be 'auto' or 'opaque': images have no transparency.", param="background"
        )
    if asked.output_format == "png" and asked.output_compression != 100:
        raise InvalidRequestError(
            "'output_compression' must be 100 with PNG, which is lossless; 'jpeg' and 'webp' take less.",
            param="output_compression",
        )

    defaults = description.defaults
    width, height = size or _size(asked.size, description, settings.max_side)
    own_steps = min(defaults.num_inference_steps, settings.max_steps)
    num_inference_steps = asked.num_inference_steps or own_steps
    check_steps(num_inference_steps, settings.max_steps, "num_inference_steps")
    guidance_scale = defaults.guidance_scale if asked.guidance_scale is None else asked.guidance_scale
    sampler = read_sampler(asked.sampler, num_inference_steps, description, "num_inference_steps")
    loras = _loras(asked, description)
    check_work(asked.n, num_inference_steps, width, height, settings.max_megapixel_steps)
    names = ("control_image", "control_model")
    return ImagesRequest(
        generation=GenerationRequest(
            id=request_id,
            model=description.id,
            prompt=asked.prompt,
            width=width,
            height=height,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=choose_seed(asked.seed, asked.n),
            seed_given=asked.seed is not None,
            n=asked.n,
            sampler=sampler,
            loras=loras,
            control=read_control(
                asked, asked.control_image, asked.control_model, names, (width, height), description
            ),
            **model_fields(asked, asked.negative_prompt, description),
            output_format=asked.output_format,
            output_compression=asked.output_compression,
            partial_images=asked.partial_images if asked.stream else 0,
            metadata=settings.image_metadata,
        ),
        fields={"loras": "loras" if asked.lora_path is None else "lora_path"},
        response_format=asked.response_format,
        stream=asked.stream,
        quality={"auto": "medium", "standard": "medium", "hd": "high"}.get(asked.quality, asked.quality),
    )


def _size(size: str | None, description: ModelInfo, max_side: int) -> tuple[int, int]:
    if size is None or size == "auto":
        return default_size(description, max_side)
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
            f"'size' must be divisible by 8 in width and height, which {size} is not.", param="size"
        )
    if not (min(width, height) >= SMALLEST_SIDE and max(width, height) <= max_side):
        raise InvalidRequestError(
            f"'size' must be between {SMALLEST_SIDE} and {max_side} pixels in width and height, not {size}.",
            param="size",
        )
    return width, height


def _loras(asked: ImagesBody, description: ModelInfo) -> tuple[tuple[str, float], ...]:
    if asked.loras is not None:
        if asked.lora_path is not None:
            raise InvalidRequestError("Give 'lora_path' or 'loras', not both.", param="loras")
        return resolve_loras(asked.loras, description, "loras")
    lora = description.default_lora if asked.lora_path is None else asked.lora_path
    return () if lora is None else resolve_loras({lora: asked.lora_scale}, description, "lora_path")


_EXAMPLE = {"prompt": EXAMPLE_PROMPT, "size": "1024x1024", "seed": 7, "num_inference_steps": 30}
GENERATIONS = Endpoint(
    path="/v1/images/generations",
    model_field="model",
    image_fields=frozenset({"control_image"}),
    claims=lambda body, is_form: not is_form,
    to_request=to_request,
    to_response=to_response,
    to_sse_event=partial(to_sse_event, "image_generation"),
    openapi={
        "operationId": "createImage",
        "summary": "Draw pictures from a prompt",
        "tags": ["Images"],
        "requestBody": request_body({"application/json": media(ImagesBody.model_json_schema(), _EXAMPLE)}),
        "responses": responses(ImagesResponse, "The pictures", stream_media()),
    },
    schemas=(ImagesResponse, ImagesStream),
)
