"""What the dialects share: a checked request, and the checks against what model and server can do."""

from __future__ import annotations

import secrets
from collections.abc import Sized
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Self, TypeVar, cast

from pydantic import BaseModel, Field, StrictBool, StrictBytes, StrictStr, ValidationError

from hypergen.api.sampler_aliases import public_name
from hypergen.errors import InvalidRequestError, RequestError
from hypergen.images.decoding import decode, from_base64, to_input_image
from hypergen.metrics import Price
from hypergen.model_info import Capability, ModelInfo
from hypergen.request import ControlInput, GenerationRequest, Preprocessor

MAX_SEED = 2**63 - 1
SMALLEST_SIDE = 64
# Of a list or object in a field: pydantic would tell what is wrong with each of a million.
MAX_ENTRIES = 64
# A picture in a field: text with base64 in JSON, or what a form's file holds.
SentFile = StrictStr | StrictBytes
# An integer is a number here, but `true` and "7" are not.
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
LoraWeight = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=2)]

_FAMILIES: dict[Capability, str] = {
    "image": "Stable Diffusion, SDXL and SD 3 do",
    "mask": "Stable Diffusion, SDXL and SD 3 do",
    "control": "Stable Diffusion and SDXL with a control model do",
    "true_cfg_scale": "FLUX does, others have the guidance scale for it",
    "loras": "Stable Diffusion, SDXL and FLUX do",
}


@dataclass(frozen=True)
class ValidatedRequest:
    """A checked request: what to draw, and how to answer."""

    generation: GenerationRequest
    response_format: Literal["url", "b64_json"] | None = None
    headers: dict[str, str] = field(default_factory=dict[str, str])
    price: Price | None = None  # counted when the pictures are drawn
    stream: bool = False
    # Fields of the request that the engine may find wrong -> what the client called them.
    fields: dict[str, str] = field(default_factory=dict[str, str])

    def refuse_stream(self) -> None:
        """For routes that answer in one piece."""
        if self.stream:
            raise InvalidRequestError("This route does not stream; leave 'stream' out.", param="stream")

    def without_input_images(self) -> Self:
        """For answering: the input images are not needed any more, and may be large."""
        return replace(self, generation=self.generation.without_input_images())

    def with_client_field_names(self, error: RequestError) -> RequestError:
        """What the engine found wrong, under the name that the client knows the field by; the message has it
        too.
        """
        error.param = self.fields.get(error.param or "", error.param)
        if error.param is not None and f"'{error.param}'" not in error.message:
            error.message = f"'{error.param}': {error.message}"
        return error


class ModelFields(BaseModel, extra="ignore"):
    """HyperGen's fields for what some model families have, the same in every dialect."""

    prompt_2: StrictStr | None = Field(
        None,
        max_length=32000,
        description="prompt of the second text encoder; models with only one take no notice",
    )
    negative_prompt_2: StrictStr | None = Field(
        None, max_length=32000, description="what not to draw, for the second text encoder"
    )
    true_cfg_scale: Number | None = Field(
        None,
        ge=1,
        le=20,
        description="how far to keep from the negative prompt, for models whose guidance scale says "
        "something else (FLUX); 1 or no negative prompt: no effect; absent: the model's, 4; others refuse it",
    )
    enable_refiner: StrictBool = Field(
        False, description="let the refiner take the last steps; models without one take no notice"
    )
    control_preprocessor: Preprocessor = Field(
        "none", description="what is done to the control picture first; canny finds its edges"
    )
    controlnet_conditioning_scale: Number = Field(
        1.0, ge=0, le=2, description="how closely to follow the control picture"
    )
    control_guidance_start: Number = Field(
        0.0, ge=0, le=1, description="share of the steps after which the control picture is followed"
    )
    control_guidance_end: Number = Field(
        1.0, ge=0, le=1, description="share of the steps up to which the control picture is followed"
    )


# What means nothing without a control picture -> its value when nobody gave it.
CONTROL_FIELDS = {
    name: field.default for name, field in ModelFields.model_fields.items() if name.startswith("control")
}

Body = TypeVar("Body", bound=BaseModel)


def validate(kind: type[Body], body: dict[str, Any]) -> Body:
    """Types and ranges of all fields.

    Raises:
        InvalidRequestError: for the first field that does not fit; `param` names it.
    """
    for name in kind.model_fields:
        value = body.get(name)
        if isinstance(value, (dict, list)) and len(cast(Sized, value)) > MAX_ENTRIES:
            raise too_many_entries(name)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = str(first["loc"][0])
        if first["type"] == "missing":
            message = f"The field '{param}' is required."
            raise InvalidRequestError(message, param=param, code="missing_required_parameter") from None
        # "Input should be ..." and "String should have ..." go on after the name.
        expected = first["msg"].removeprefix("Input ").removeprefix("String ")
        raise InvalidRequestError(f"'{param}' {expected}.", param=param) from None


def too_many_entries(param: str) -> InvalidRequestError:
    return InvalidRequestError(f"'{param}' may have at most {MAX_ENTRIES} entries.", param=param)


def check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise InvalidRequestError("'prompt' is blank.", param="prompt")


def choose_seed(seed: int | None, n: int) -> int:
    """The first picture's seed: the one that was asked for, or a drawn one."""
    if seed is None:
        # Drawn before the first try, so that a second try after a crash gives the same pictures. Small
        # enough that a JavaScript client reads it back exactly.
        return secrets.randbelow(2**32)
    if seed + n - 1 > MAX_SEED:
        raise InvalidRequestError(
            f"'seed' is too large: the last image's would be above {MAX_SEED}.", param="seed"
        )
    return seed


def read_sampler(given: str | None, steps: int, description: ModelInfo, steps_param: str) -> str | None:
    """Our name for the sampler that was asked for; None: the model's own."""
    sampler = None if given is None else public_name(given)
    if given is not None and sampler not in description.samplers:
        known = ", ".join(description.samplers) or "none to choose, for a model of this kind"
        raise InvalidRequestError(
            f"'sampler' '{given[:40]}' is unknown; this server has {known}.", param="sampler"
        )
    min_steps = description.min_steps if sampler is None else description.samplers[sampler]
    if steps < min_steps:
        name = sampler or "model's own"
        raise InvalidRequestError(
            f"'{steps_param}' must be at least {min_steps} with the {name} sampler.", param=steps_param
        )
    return sampler


def default_size(description: ModelInfo, max_side: int) -> tuple[int, int]:
    """The model's own width and height, or less of the same shape where the server allows only that."""
    width, height = description.defaults.width, description.defaults.height
    scale = min(1.0, max_side / max(width, height))
    return max(SMALLEST_SIDE, int(width * scale) // 8 * 8), max(SMALLEST_SIDE, int(height * scale) // 8 * 8)


def check_steps(steps: int, most: int, steps_param: str) -> None:
    if steps > most:
        raise InvalidRequestError(
            f"'{steps_param}' must be at most {most} on this server, not {steps}.", param=steps_param
        )


def check_work(n: int, steps: int, width: int, height: int, most: float, size_param: str = "size") -> None:
    work = n * steps * width * height / 1e6
    if work > most:
        param = "n" if n > 1 else size_param
        raise InvalidRequestError(
            f"'{param}' is too large: this is {work:.0f} images x steps x megapixels; the server takes "
            f"{most:.0f} in one request.",
            param=param,
        )


def check_capability(option: Capability, param: str, description: ModelInfo) -> None:
    """Whether the served model's family has what the field `param` asks for."""
    if option not in description.capabilities:
        raise InvalidRequestError(
            f"This server's model ({description.family}) does not take '{param}'; {_FAMILIES[option]}.",
            param=param,
            code="unsupported_parameter",
        )


def model_fields(asked: ModelFields, negative_prompt: str | None, description: ModelInfo) -> dict[str, Any]:
    """The fields of `GenerationRequest` for what some families have; without effect on the others, as the
    Hyperbolic documents have it, so that they do not even stand in the request. What no document has is
    refused instead.

    Raises:
        InvalidRequestError: the family has no `true_cfg_scale`.
    """
    if asked.true_cfg_scale is not None:
        check_capability("true_cfg_scale", "true_cfg_scale", description)
    given: dict[Capability, dict[str, Any]] = {
        "negative_prompt": {"negative_prompt": negative_prompt or None},
        "prompt_2": {
            "prompt_2": asked.prompt_2 or None,
            "negative_prompt_2": asked.negative_prompt_2 or None,
        },
        "true_cfg_scale": {"true_cfg_scale": asked.true_cfg_scale},
        "enable_refiner": {"enable_refiner": asked.enable_refiner},
    }
    known = [fields for option, fields in given.items() if option in description.capabilities]
    return {"negative_prompt": None} | {name: value for fields in known for name, value in fields.items()}


def read_control(
    asked: ModelFields,
    image: str | bytes | None,
    model: str | None,
    names: tuple[str, str],
    size: tuple[int, int],
    description: ModelInfo,
) -> ControlInput | None:
    """The control picture of a request and the model that follows it.

    Args:
        names: of the fields for picture and model, in the words of the dialect.
        size: width and height of what is drawn.

    Raises:
        InvalidRequestError: one of the two is missing, the model is unknown, or the family has none.
    """
    image_param, model_param = names
    options = [name for name in CONTROL_FIELDS if getattr(asked, name) != CONTROL_FIELDS[name]]
    if image is None and model is None and not options:
        return None
    given = image_param if image is not None else model_param if model is not None else options[0]
    check_capability("control", given, description)
    if image is None:
        message = f"'{given}' needs a picture to follow in '{image_param}'."
        raise InvalidRequestError(message, param=image_param, code="missing_required_parameter")
    known = description.controlnets
    if model is None and len(known) == 1:
        model = known[0]
    if model is None or model not in known:
        message = f"'{model_param}' must be one of this server's control models: {', '.join(known)}."
        raise InvalidRequestError(message, param=model_param)
    if asked.control_guidance_start >= asked.control_guidance_end:
        message = "'control_guidance_start' must be less than 'control_guidance_end'."
        raise InvalidRequestError(message, param="control_guidance_start")
    data = image if isinstance(image, bytes) else from_base64(image, image_param)
    return ControlInput(
        model=model,
        image=to_input_image(decode(data, image_param), *size),
        preprocessor=asked.control_preprocessor,
        scale=asked.controlnet_conditioning_scale,
        start=asked.control_guidance_start,
        end=asked.control_guidance_end,
    )
