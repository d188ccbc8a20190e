"""OpenAI's images API with HyperGen's extensions: POST /v1/images/generations.

Source: OpenAI's OpenAPI description 2.3.0 and the HyperGen documents; docs/api.md says what counts.
"""

from __future__ import annotations

import base64
import re
import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr, ValidationError

from hypergen.api.errors import to_json
from hypergen.config import ServerSettings
from hypergen.errors import InvalidRequestError
from hypergen.generation import GenerationRequest, ImageFinished, ModelDescription, OutputFormat
from hypergen.sampler_names import public_name

MAX_SEED = 2**63 - 1
_SIZE = re.compile(r"([1-9][0-9]{1,4})x([1-9][0-9]{1,4})", re.ASCII)
_SMALLEST_SIDE = 64
# Pixels of one image token, as `usage` counts them: a square of 16 x 16.
_TOKEN_SIDE = 16

# An integer is a number here, but `true` and "7" are not.
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class ImagesBody(BaseModel, extra="ignore"):
    """The body of a generation request. Unknown fields are ignored, and null counts as not given."""

    prompt: StrictStr = Field(
        min_length=1, max_length=32000, description="what to draw", examples=["a red circle"]
    )
    model: StrictStr | None = Field(
        None, description="ignored: the server draws with the model it was started with"
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
    stream: StrictBool = Field(False, description="not served yet: only false")
    partial_images: StrictInt = Field(0, ge=0, le=3, description="previews of a stream")
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
    lora_path: StrictStr | None = Field(None, description="name of a LoRA of this server")
    lora_scale: Number = Field(1.0, ge=0, le=2, description="strength of the LoRA")


@dataclass(frozen=True)
class ImagesRequest:
    """A checked request: what to draw, and how to answer."""

    generation: GenerationRequest
    response_format: Literal["url", "b64_json"] | None
    quality: str


def to_request(
    body: dict[str, Any], description: ModelDescription, settings: ServerSettings, request_id: str
) -> ImagesRequest:
    """Check a body and resolve its defaults.

    Raises:
        InvalidRequestError: `param` names the field.
    """
    asked = _validate(body)
    if not asked.prompt.strip():
        raise InvalidRequestError("The prompt is blank.", param="prompt")
    if asked.background == "transparent":
        raise InvalidRequestError(
            "Pictures are opaque; use background 'auto' or 'opaque'.", param="background"
        )
    if asked.output_format == "png" and asked.output_compression != 100:
        raise InvalidRequestError(
            "PNG is lossless and takes only output_compression 100; use output_format 'jpeg' or 'webp'.",
            param="output_compression",
        )
    if asked.stream:
        raise InvalidRequestError("Streaming is not served; leave stream out.", param="stream")
    if asked.seed is not None and asked.seed + asked.n - 1 > MAX_SEED:
        raise InvalidRequestError(f"The last picture's seed would be above {MAX_SEED}.", param="seed")
    if asked.lora_path is not None:
        raise InvalidRequestError("lora_path must name a LoRA this server offers.", param="lora_path")

    defaults = description.defaults
    width, height = _size(asked.size, description, settings.max_side)
    num_inference_steps = asked.num_inference_steps or defaults.num_inference_steps
    guidance_scale = defaults.guidance_scale if asked.guidance_scale is None else asked.guidance_scale
    sampler = None if asked.sampler is None else public_name(asked.sampler)
    _check_sampler(sampler, num_inference_steps, description)
    _check_work(asked.n, num_inference_steps, width, height, settings.max_megapixel_steps)
    return ImagesRequest(
        generation=GenerationRequest(
            id=request_id,
            prompt=asked.prompt,
            negative_prompt=asked.negative_prompt or None,
            width=width,
            height=height,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            # Drawn before the first try, so that a second try after a crash gives the same pictures. Small
            # enough that a JavaScript client reads it back exactly.
            seed=secrets.randbelow(2**32) if asked.seed is None else asked.seed,
            seed_given=asked.seed is not None,
            n=asked.n,
            sampler=sampler,
            output_format=asked.output_format,
            output_compression=asked.output_compression,
            metadata=settings.image_metadata,
        ),
        response_format=asked.response_format,
        quality={"auto": "medium", "standard": "medium", "hd": "high"}.get(asked.quality, asked.quality),
    )


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
        "usage": _usage(request, images[0].prompt_tokens),
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


def _validate(body: dict[str, Any]) -> ImagesBody:
    try:
        return ImagesBody.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = str(first["loc"][0])
        if first["type"] == "missing":
            message = f"The field '{param}' is required."
            raise InvalidRequestError(message, param=param, code="missing_required_parameter") from None
        # "Input should be ..." and "String should have ..." go on after the name.
        expected = first["msg"].removeprefix("Input ").removeprefix("String ")
        raise InvalidRequestError(f"'{param}' {expected}.", param=param) from None


def _size(size: str | None, description: ModelDescription, max_side: int) -> tuple[int, int]:
    if size is None or size == "auto":
        return description.defaults.width, description.defaults.height
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
            f"Width and height must be divisible by 8, which {size} is not.", param="size"
        )
    if not (min(width, height) >= _SMALLEST_SIDE and max(width, height) <= max_side):
        raise InvalidRequestError(
            f"Width and height must be between {_SMALLEST_SIDE} and {max_side} pixels, not {size}.",
            param="size",
        )
    return width, height


def _check_sampler(sampler: str | None, num_inference_steps: int, description: ModelDescription) -> None:
    if sampler is not None and sampler not in description.samplers:
        known = ", ".join(description.samplers)
        raise InvalidRequestError(
            f"Unknown sampler '{sampler[:40]}'; this server has {known}.", param="sampler"
        )
    min_steps = description.min_steps if sampler is None else description.samplers[sampler]
    if num_inference_steps < min_steps:
        name = sampler or "model's own"
        raise InvalidRequestError(
            f"The {name} sampler needs at least {min_steps} steps.", param="num_inference_steps"
        )


def _check_work(n: int, num_inference_steps: int, width: int, height: int, most: float) -> None:
    work = n * num_inference_steps * width * height / 1e6
    if work > most:
        raise InvalidRequestError(
            f"This is {work:.0f} images x steps x megapixels; the server takes {most:.0f} in one request.",
            param="n" if n > 1 else "size",
        )


def _usage(request: GenerationRequest, prompt_tokens: int) -> dict[str, Any]:
    per_image = -(-request.width // _TOKEN_SIDE) * -(-request.height // _TOKEN_SIDE)
    output_tokens = per_image * request.n
    return {
        "input_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "input_tokens_details": {"text_tokens": prompt_tokens, "image_tokens": 0},
        "output_tokens_details": {"text_tokens": 0, "image_tokens": output_tokens},
    }
