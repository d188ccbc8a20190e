"""Hyperbolic's image API: POST /v1/image/generation.

Source: Hyperbolic's OpenAPI file v1 and its guide page; where they differ, both are supported.
docs/api.md describes the result.
"""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictInt, StrictStr

from hypergen.api.dialects.endpoint import Endpoint
from hypergen.api.errors import to_json
from hypergen.api.loras import resolve_loras
from hypergen.api.openapi import reference, request_body, responses
from hypergen.api.validated_request import ValidatedRequest
from hypergen.api.validation import (
    SMALLEST_SIDE,
    LoraWeight,
    ModelFields,
    Number,
    Seed,
    capability_fields,
    check_capability,
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
from hypergen.events import ImageFinished
from hypergen.images.decoding import decode, from_base64, to_input_image
from hypergen.model_info import ModelInfo
from hypergen.request import GenerationRequest

_MAX_SIDE = 2048
_LARGEST_SIDE = 2432
# Documented, although one side is longer than the documented limit.
_LARGE_SIZES = ((1664, _LARGEST_SIDE), (_LARGEST_SIDE, 1664))
_DEFAULT_STEPS = 30
# Field of `GenerationRequest` -> field of this dialect.
_CLIENT_FIELDS = {
    "loras": "lora",
    "control_model": "controlnet_name",
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
}
_COMMON_STEPS = 50  # the default of models that are not distilled
_Base64 = Annotated[StrictStr, Field(json_schema_extra={"format": "byte"})]


class ImageGenerationRequest(ModelFields):
    """The body of a request. Unknown fields are ignored; null means absent."""

    model_name: StrictStr = Field(
        min_length=1,
        description="id or alias of a served model; a single model answers to every name",
        examples=["SDXL1.0-base"],
    )
    prompt: StrictStr = Field(
        min_length=1,
        max_length=32000,
        description="text prompt",
        examples=["A photorealistic cyberpunk cat wearing sunglasses"],
    )
    negative_prompt: StrictStr | None = Field(None, max_length=32000, description="negative prompt")
    steps: StrictInt | None = Field(
        None,
        ge=1,
        le=100,
        description="denoising steps; default: 30 if the model's default is 50, else the model's",
    )
    cfg_scale: Number | None = Field(
        None,
        ge=1,
        le=20,
        description="guidance scale; default: the model's, mostly 7.5",
    )
    height: StrictInt | None = Field(
        None,
        ge=SMALLEST_SIDE,
        le=_LARGEST_SIDE,
        multiple_of=8,
        description="pixels; above 2048 only 1664x2432 and 2432x1664; default: the model's, mostly 1024",
    )
    width: StrictInt | None = Field(
        None, ge=SMALLEST_SIDE, le=_LARGEST_SIDE, multiple_of=8, description="as height"
    )
    seed: Seed = Field(
        None,
        description="image i uses seed + i; the same seed gives the same image; -1 or absent: random",
    )
    n: StrictInt = Field(1, ge=1, le=4, description="number of images")
    backend: Literal["auto", "tvm", "torch"] = Field(
        "auto", description="accepted for compatibility; always torch"
    )
    image: _Base64 | None = Field(
        None, description="input image: base64 of a PNG, JPEG or WebP", examples=["iVBORw0KGgo..."]
    )
    strength: Number = Field(
        0.7, ge=0, le=1, description="how much the input image may change; ignored without one"
    )
    lora: dict[StrictStr, LoraWeight] = Field(
        default_factory=dict[str, float],
        description="names of this server's LoRAs and their weights",
        examples=[{"Pixel_Art": 1.0}],
    )
    controlnet_name: StrictStr | None = Field(None, description="name of a ControlNet of this server")
    controlnet_image: _Base64 | None = Field(None, description="control image, base64")


class GeneratedImage(BaseModel):
    image: str = Field(description="Base64-encoded image bytes.")
    seed: int


class ImageGenerationResponse(BaseModel):
    images: list[GeneratedImage]
    inference_time: float = Field(description="Seconds spent in inference.")


def to_request(
    body: dict[str, Any], model_info: ModelInfo, settings: ServerSettings, request_id: str
) -> ValidatedRequest:
    """Validate a body and resolve its defaults.

    Raises:
        InvalidRequestError: `param` names the field.
    """
    fields = validate(ImageGenerationRequest, body)
    check_prompt(fields.prompt)
    defaults = model_info.defaults
    default_width, default_height = default_size(model_info, settings.max_side)
    width, height = fields.width or default_width, fields.height or default_height
    _check_size(width, height, settings.max_side)
    default_steps = defaults.num_inference_steps
    if default_steps == _COMMON_STEPS:
        default_steps = _DEFAULT_STEPS
    steps = fields.steps or min(default_steps, settings.max_steps)
    check_steps(steps, settings.max_steps, "steps")
    sampler = read_sampler(fields.sampler, fields.scheduler, steps, model_info, "steps")
    check_work(fields.n, steps, width, height, settings.max_megapixel_steps, size_param="width")
    seed = choose_seed(fields.seed, fields.n)
    _check_loras(fields.lora, model_info)
    image = None
    if fields.image is not None:
        if fields.model_name.upper().startswith("FLUX"):
            message = "'image' is not supported by FLUX; use another model."
            raise InvalidRequestError(message, param="image", code="unsupported_parameter")
        check_capability("image", "image", model_info)
        image = to_input_image(decode(from_base64(fields.image, "image"), "image"), width, height)
    params = ("controlnet_image", "controlnet_name")
    request = GenerationRequest(
        id=request_id,
        model=model_info.id,
        prompt=fields.prompt,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=defaults.guidance_scale if fields.cfg_scale is None else fields.cfg_scale,
        seed=seed,
        seed_given=fields.seed is not None,
        n=fields.n,
        sampler=sampler,
        image=image,
        strength=1.0 if image is None else fields.strength,
        control=read_control(
            fields, fields.controlnet_image, fields.controlnet_name, params, (width, height), model_info
        ),
        loras=resolve_loras(fields.lora, model_info, "lora"),
        metadata=settings.image_metadata,
        **capability_fields(fields, fields.negative_prompt, model_info),
    )
    validated = ValidatedRequest(request, response_format="b64_json", client_fields=_CLIENT_FIELDS)
    if settings.price_rate is None:
        return validated
    price = f"{request.price(settings.price_rate):.8f}".rstrip("0").rstrip(".")
    return replace(validated, headers={"x-hypergen-price": price})


def to_response(
    validated: ValidatedRequest, images: list[ImageFinished], urls: list[str] | None, created: int
) -> list[bytes]:
    """The response as pieces of JSON; each image's base64 is a piece.

    Base64 needs no escaping, for which the json module would scan megabytes while it holds the GIL.
    """
    inference_time = max(image.engine_s for image in images)
    pieces = [b'{"images":[']
    for position, image in enumerate(images):
        start = b',{"image":"' if position else b'{"image":"'
        pieces += [start, base64.b64encode(image.data), b'",' + to_json({"seed": image.seed})[1:]]
    return [*pieces, b"]," + to_json({"inference_time": round(inference_time, 4)})[1:]]


def _check_size(width: int, height: int, max_side: int) -> None:
    if (width, height) in _LARGE_SIZES and max_side >= _MAX_SIDE:
        return
    for param, side in (("width", width), ("height", height)):
        if side > min(_MAX_SIDE, max_side):
            raise InvalidRequestError(
                f"'{param}' must be at most {min(_MAX_SIDE, max_side)}, not {side}.", param=param
            )


def _check_loras(loras: dict[str, float], model_info: ModelInfo) -> None:
    """Accept names only; OpenAI's dialect also accepts paths."""
    if loras:
        check_capability("loras", "lora", model_info)
    for name in loras:
        if name not in model_info.loras:
            available = ", ".join(model_info.loras) or "none"
            message = f"'lora' '{name[:100]}' is unknown; available LoRAs of {model_info.id}: {available}."
            raise InvalidRequestError(message, param="lora")


_EXAMPLE = {
    "model_name": "SDXL1.0-base",
    "prompt": "A photorealistic cyberpunk cat wearing sunglasses",
    "steps": 30,
    "cfg_scale": 7.5,
    "height": 1024,
    "width": 1024,
}
_CONTENT = {
    "schema": reference(ImageGenerationRequest),
    "examples": {"SDXLBasic": {"summary": "Basic SDXL generation", "value": _EXAMPLE}},
}
HYPERBOLIC = Endpoint(
    path="/v1/image/generation",
    model_field="model_name",
    image_fields=frozenset({"image", "controlnet_image"}),
    claims=lambda body, is_form: not is_form and "model_name" in body,
    body=ImageGenerationRequest,
    to_request=to_request,
    to_response=to_response,
    # As in Hyperbolic's OpenAPI file v1.
    openapi={
        "operationId": "generateImage",
        "summary": "Hyperbolic Generate An Image",
        "description": "Generate one or more images from a text prompt using the specified diffusion model. "
        "Returns base64-encoded images in the `images` array.",
        "tags": ["Image Generation"],
        "requestBody": request_body({"application/json": _CONTENT}),
        "responses": responses(ImageGenerationResponse, "Successful image generation"),
    },
    schemas=(ImageGenerationRequest, ImageGenerationResponse),
)
