"""Hyperbolic's image API: POST /v1/image/generation.

Source: Hyperbolic's OpenAPI description v1 and its guide page; where they differ, both are served.
docs/api.md says what counts.
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
from hypergen.api.validation import (
    MAX_SEED,
    SMALLEST_SIDE,
    LoraWeight,
    ModelFields,
    Number,
    ValidatedRequest,
    check_capability,
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
from hypergen.events import ImageFinished
from hypergen.images.decoding import decode, from_base64, to_input_image
from hypergen.metrics import Price
from hypergen.model_info import ModelInfo
from hypergen.request import GenerationRequest

_MAX_SIDE = 2048
_LARGEST_SIDE = 2432
# Documented, although one side is longer than the documented limit.
_LARGE_SIZES = ((1664, _LARGEST_SIDE), (_LARGEST_SIDE, 1664))
_STEPS = 30
# Names of fields in the engine's errors -> in this dialect.
_ENGINE_FIELDS = {
    "loras": "lora",
    "control_model": "controlnet_name",
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
}
_USUAL_STEPS = 50  # of a model that asks for nothing special
_Base64 = Annotated[StrictStr, Field(json_schema_extra={"format": "byte"})]


class ImageGenerationRequest(ModelFields):
    """The body of a request. Unknown fields are ignored, and null counts as not given."""

    model_name: StrictStr = Field(
        min_length=1,
        description="id or alias of one of the models in /v1/models; any other name is the first",
        examples=["SDXL1.0-base"],
    )
    prompt: StrictStr = Field(
        min_length=1,
        max_length=32000,
        description="what to draw",
        examples=["A photorealistic cyberpunk cat wearing sunglasses"],
    )
    negative_prompt: StrictStr | None = Field(None, max_length=32000, description="what not to draw")
    steps: StrictInt | None = Field(
        None, ge=1, le=100, description="denoising steps; absent: 30, or what the model was made for"
    )
    cfg_scale: Number | None = Field(
        None,
        ge=1,
        le=20,
        description="how closely to follow the prompt; absent: 7.5, or what the model was made for",
    )
    height: StrictInt | None = Field(
        None,
        ge=SMALLEST_SIDE,
        le=_LARGEST_SIDE,
        multiple_of=8,
        description="pixels; above 2048 only 1664x2432 and 2432x1664; absent: the model's own, mostly 1024",
    )
    width: StrictInt | None = Field(
        None, ge=SMALLEST_SIDE, le=_LARGEST_SIDE, multiple_of=8, description="as height"
    )
    seed: StrictInt | None = Field(
        None, ge=0, le=MAX_SEED, description="the same seed gives the same picture; picture i has seed + i"
    )
    n: StrictInt = Field(1, ge=1, le=4, description="how many pictures")
    sampler: StrictStr | None = Field(
        None, description="one of the samplers in /health; absent: the model's own"
    )
    backend: Literal["auto", "tvm", "torch"] = Field("auto", description="accepted: all three are torch here")
    image: _Base64 | None = Field(
        None, description="picture to start from, base64 of PNG, JPEG or WebP", examples=["iVBORw0KGgo..."]
    )
    strength: Number = Field(
        0.7, ge=0, le=1, description="how much of the picture may change; without one, no effect"
    )
    lora: dict[StrictStr, LoraWeight] = Field(
        default_factory=dict[str, float],
        description="names of this server's LoRAs with their weights",
        examples=[{"Pixel_Art": 1.0}],
    )
    controlnet_name: StrictStr | None = Field(None, description="name of a control model of this server")
    controlnet_image: _Base64 | None = Field(None, description="picture it follows, base64")


class GeneratedImage(BaseModel):
    image: str = Field(description="Base64-encoded image bytes.")
    seed: int


class ImageGenerationResponse(BaseModel):
    images: list[GeneratedImage]
    inference_time: float = Field(description="Seconds spent in inference.")


def to_request(
    body: dict[str, Any], description: ModelInfo, settings: ServerSettings, request_id: str
) -> ValidatedRequest:
    """Check a body and resolve its defaults.

    Raises:
        InvalidRequestError: `param` names the field.
    """
    asked = validate(ImageGenerationRequest, body)
    check_prompt(asked.prompt)
    defaults = description.defaults
    own_width, own_height = default_size(description, settings.max_side)
    width, height = asked.width or own_width, asked.height or own_height
    _check_size(width, height, settings.max_side)
    own_steps = defaults.num_inference_steps
    steps = asked.steps or min(_STEPS if own_steps == _USUAL_STEPS else own_steps, settings.max_steps)
    check_steps(steps, settings.max_steps, "steps")
    sampler = read_sampler(asked.sampler, steps, description, "steps")
    check_work(asked.n, steps, width, height, settings.max_megapixel_steps, size_param="width")
    seed = choose_seed(asked.seed, asked.n)
    _check_loras(asked.lora, description)
    picture = None
    if asked.image is not None:
        if asked.model_name.upper().startswith("FLUX"):
            message = "FLUX does not start from an 'image'; leave it out or name another model."
            raise InvalidRequestError(message, param="image", code="unsupported_parameter")
        check_capability("image", "image", description)
        picture = to_input_image(decode(from_base64(asked.image, "image"), "image"), width, height)
    names = ("controlnet_image", "controlnet_name")
    request = GenerationRequest(
        id=request_id,
        model=description.id,
        prompt=asked.prompt,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=defaults.guidance_scale if asked.cfg_scale is None else asked.cfg_scale,
        seed=seed,
        seed_given=asked.seed is not None,
        n=asked.n,
        sampler=sampler,
        image=picture,
        strength=1.0 if picture is None else asked.strength,
        control=read_control(
            asked, asked.controlnet_image, asked.controlnet_name, names, (width, height), description
        ),
        loras=resolve_loras(asked.lora, description, "lora"),
        metadata=settings.image_metadata,
        **model_fields(asked, asked.negative_prompt, description),
    )
    asked_for = ValidatedRequest(request, response_format="b64_json", fields=_ENGINE_FIELDS)
    if settings.price_rate is None:
        return asked_for
    amount = price(request, settings.price_rate)
    headers = {"x-hypergen-price": f"{amount:.8f}".rstrip("0").rstrip(".")}
    return replace(asked_for, headers=headers, price=Price(description.id, amount))


def to_response(
    asked: ValidatedRequest, images: list[ImageFinished], urls: list[str] | None, created: int
) -> list[bytes]:
    """The answer as JSON in pieces, of which a picture is one: base64 needs no escaping, and the JSON module
    would hold the event loop up while it looks for what does.
    """
    inference_time = max(image.engine_s for image in images)
    pieces = [b'{"images":[']
    for position, image in enumerate(images):
        start = b',{"image":"' if position else b'{"image":"'
        pieces += [start, base64.b64encode(image.data), b'",' + to_json({"seed": image.seed})[1:]]
    return [*pieces, b"]," + to_json({"inference_time": round(inference_time, 4)})[1:]]


def price(request: GenerationRequest, rate: float) -> float:
    """What a request costs by Hyperbolic's formula.

    Args:
        rate: the price of one picture of 1024x1024 with 25 steps.

    Source: price = rate x (width / 1024) x (height / 1024) x (steps / 25), for each picture.
    """
    each = rate * (request.width / 1024) * (request.height / 1024) * (request.num_inference_steps / 25)
    return each * request.n


def _check_size(width: int, height: int, max_side: int) -> None:
    if (width, height) in _LARGE_SIZES and max_side >= _MAX_SIDE:
        return
    for param, side in (("width", width), ("height", height)):
        if side > min(_MAX_SIDE, max_side):
            raise InvalidRequestError(
                f"'{param}' must be at most {min(_MAX_SIDE, max_side)}, not {side}.", param=param
            )


def _check_loras(loras: dict[str, float], description: ModelInfo) -> None:
    """Names only, where OpenAI's dialect also takes paths."""
    if loras:
        check_capability("loras", "lora", description)
    for name in loras:
        if name not in description.loras:
            known = ", ".join(description.loras) or "none"
            message = f"'lora' names an unknown LoRA, '{name[:100]}'; {description.id} has {known}."
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
    to_request=to_request,
    to_response=to_response,
    # In the words of Hyperbolic's OpenAPI file v1.
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
