"""Validation shared by all dialects."""

from __future__ import annotations

import secrets
from collections.abc import Sized
from typing import Annotated, Any, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    StrictBool,
    StrictBytes,
    StrictInt,
    StrictStr,
    ValidationError,
)

from hypergen.api.sampler_aliases import schedule_name, split_name
from hypergen.errors import InvalidRequestError
from hypergen.images.decoding import decode, from_base64, to_input_image
from hypergen.model_info import Capability, ModelInfo
from hypergen.request import ControlInput, Preprocessor

MAX_SEED = 2**63 - 1
SMALLEST_SIDE = 64
# In a list or object, because pydantic would collect an error for each of a million entries.
MAX_ENTRIES = 64
# An input image: base64 text in JSON, or the bytes of a file in a form.
InputFile = StrictStr | StrictBytes
# An integer is a number here, but `true` and "7" are not.
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
LoraWeight = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=2)]
# -1 is a random seed in other programs.
Seed = Annotated[
    Annotated[StrictInt, Field(ge=-1, le=MAX_SEED)] | None,
    AfterValidator(lambda seed: None if seed == -1 else seed),
]


class ModelFields(BaseModel, extra="ignore"):
    """Fields that are the same in all dialects; only some model families support them."""

    sampler: StrictStr | None = Field(
        None,
        description="one of the samplers in /health, which may end in a schedule, such as `dpmpp_2m_karras`; "
        "names of A1111, ComfyUI and InvokeAI are accepted; default: the model's scheduler",
    )
    scheduler: StrictStr | None = Field(
        None, description="the sampler's schedule, one of those in /health; default: the model's"
    )
    prompt_2: StrictStr | None = Field(
        None,
        max_length=32000,
        description="prompt for the second text encoder; ignored by models with one text encoder",
    )
    negative_prompt_2: StrictStr | None = Field(
        None, max_length=32000, description="negative prompt for the second text encoder"
    )
    clip_skip: StrictInt | None = Field(
        None,
        ge=1,
        le=12,
        description="the hidden layer of CLIP that encodes prompts, counted from the last, which is 1; "
        "default: the model's, 1 for Stable Diffusion, 2 for SDXL; unsupported by other models",
    )
    true_cfg_scale: Number | None = Field(
        None,
        ge=1,
        le=20,
        description="CFG scale for guidance-distilled models (FLUX); no effect at 1 or "
        "without a negative prompt; default: the model's, 4; unsupported by other models",
    )
    enable_refiner: StrictBool = Field(
        False, description="use the refiner for the last steps; ignored by models without a refiner"
    )
    control_preprocessor: Preprocessor = Field(
        "none", description="preprocessing of the control image; canny detects its edges"
    )
    controlnet_conditioning_scale: Number = Field(1.0, ge=0, le=2, description="strength of the ControlNet")
    control_guidance_start: Number = Field(
        0.0, ge=0, le=1, description="share of the steps at which the ControlNet starts"
    )
    control_guidance_end: Number = Field(
        1.0, ge=0, le=1, description="share of the steps at which the ControlNet ends"
    )


# Fields that need a control image -> their defaults.
CONTROL_FIELDS = {
    name: field.default for name, field in ModelFields.model_fields.items() if name.startswith("control")
}

Body = TypeVar("Body", bound=BaseModel)


def validate(model: type[Body], body: dict[str, Any]) -> Body:
    """Validate the types and ranges of all fields.

    Raises:
        InvalidRequestError: for the first invalid field; `param` names it.
    """
    for name in model.model_fields:
        value = body.get(name)
        if isinstance(value, (dict, list)) and len(cast(Sized, value)) > MAX_ENTRIES:
            raise too_many_entries(name)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = str(first["loc"][0])
        if first["type"] == "missing":
            message = f"The field '{param}' is required."
            raise InvalidRequestError(message, param=param, code="missing_required_parameter") from None
        # Pydantic's "Input should be ..." and "String should have ..." continue after the name.
        expected = first["msg"].removeprefix("Input ").removeprefix("String ")
        raise InvalidRequestError(f"'{param}' {expected}.", param=param) from None


def too_many_entries(param: str) -> InvalidRequestError:
    return InvalidRequestError(f"'{param}' may have at most {MAX_ENTRIES} entries.", param=param)


def check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise InvalidRequestError("'prompt' must not be blank.", param="prompt")


def choose_seed(seed: int | None, n: int) -> int:
    """The first image's seed: the request's, or a random one."""
    if seed is None:
        # Chosen here, so that a retry after an engine crash generates the same images. Below 2**53, so that
        # JavaScript clients read it exactly.
        return secrets.randbelow(2**32)
    if seed + n - 1 > MAX_SEED:
        raise InvalidRequestError(
            f"'seed' is too large: the seed of the last image would exceed {MAX_SEED}.", param="seed"
        )
    return seed


def read_sampler(
    name: str | None, scheduler: str | None, steps: int, model_info: ModelInfo, steps_param: str
) -> str | None:
    """The public name of a requested sampler, with its schedule; None: the model's own scheduler.

    Args:
        name: which may end in a schedule.
        scheduler: name of a schedule.
        steps_param: the dialect's name for the number of steps.

    Raises:
        InvalidRequestError: the sampler or the schedule is unknown, or the sampler needs more steps.
    """
    requested = None if scheduler is None else schedule_name(scheduler)
    if name is None:
        if requested is not None:
            raise InvalidRequestError("'scheduler' needs a 'sampler'.", param="scheduler")
        _check_min_steps("default", model_info.min_steps, steps, steps_param)
        return None
    sampler, own = split_name(name)
    if sampler not in model_info.samplers:
        available = ", ".join(model_info.samplers) or "none"
        raise InvalidRequestError(
            f"'sampler' '{name[:40]}' is unknown; available samplers: {available}.", param="sampler"
        )
    if None not in (requested, own) and requested != own:
        raise InvalidRequestError(
            f"'scheduler' must be '{own}' or absent, because 'sampler' names it.", param="scheduler"
        )
    _check_min_steps(sampler, model_info.samplers[sampler], steps, steps_param)
    schedule = own if requested is None else requested
    if schedule is None:
        return sampler
    schedules = model_info.schedules.get(sampler, ())
    if schedule not in schedules:
        param = "sampler" if requested is None else "scheduler"
        available = ", ".join(schedules) or "none"
        raise InvalidRequestError(
            f"'{param}': {sampler} has no schedule '{schedule[:40]}'; available: {available}.", param=param
        )
    return f"{sampler}_{schedule}"


def _check_min_steps(sampler: str, min_steps: int, steps: int, steps_param: str) -> None:
    if steps < min_steps:
        raise InvalidRequestError(
            f"'{steps_param}' must be at least {min_steps} with the {sampler} sampler.", param=steps_param
        )


def default_size(model_info: ModelInfo, max_side: int) -> tuple[int, int]:
    """The model's default width and height, scaled down to the server's limit."""
    width, height = model_info.defaults.width, model_info.defaults.height
    scale = min(1.0, max_side / max(width, height))
    return max(SMALLEST_SIDE, int(width * scale) // 8 * 8), max(SMALLEST_SIDE, int(height * scale) // 8 * 8)


def check_steps(steps: int, max_steps: int, steps_param: str) -> None:
    if steps > max_steps:
        raise InvalidRequestError(
            f"'{steps_param}' must be at most {max_steps} on this server, not {steps}.", param=steps_param
        )


def check_work(
    n: int, steps: int, width: int, height: int, max_work: float, size_param: str = "size"
) -> None:
    """Check images x steps x megapixels against the server's limit."""
    work = n * steps * width * height / 1e6
    if work > max_work:
        param = "n" if n > 1 else size_param
        raise InvalidRequestError(
            f"'{param}' is too large: {work:.0f} images x steps x megapixels; the limit per request is "
            f"{max_work:.0f}.",
            param=param,
        )


def check_capability(capability: Capability, param: str, model_info: ModelInfo) -> None:
    """Check that the served model has the capability that the field `param` needs."""
    if capability not in model_info.capabilities:
        raise InvalidRequestError(
            f"'{param}' is not supported by the served model ({model_info.family}).",
            param=param,
            code="unsupported_parameter",
        )


def capability_fields(
    fields: ModelFields, negative_prompt: str | None, model_info: ModelInfo
) -> dict[str, Any]:
    """The fields of `GenerationRequest` that need a capability.

    Fields that the model does not support are left out, because Hyperbolic's documents say that they have no
    effect. `clip_skip` and `true_cfg_scale`, which are not in these documents, are errors instead.

    Raises:
        InvalidRequestError: the model does not support one of these.
    """
    own: tuple[Capability, ...] = ("clip_skip", "true_cfg_scale")
    for name in own:
        if getattr(fields, name) is not None:
            check_capability(name, name, model_info)
    by_capability: dict[Capability, dict[str, Any]] = {
        "negative_prompt": {"negative_prompt": negative_prompt or None},
        "prompt_2": {
            "prompt_2": fields.prompt_2 or None,
            "negative_prompt_2": fields.negative_prompt_2 or None,
        },
        "clip_skip": {"clip_skip": fields.clip_skip},
        "true_cfg_scale": {"true_cfg_scale": fields.true_cfg_scale},
        "enable_refiner": {"enable_refiner": fields.enable_refiner},
    }
    supported = [
        values for capability, values in by_capability.items() if capability in model_info.capabilities
    ]
    return {"negative_prompt": None} | {name: value for values in supported for name, value in values.items()}


def read_control(
    fields: ModelFields,
    image: str | bytes | None,
    model: str | None,
    params: tuple[str, str],
    size: tuple[int, int],
    model_info: ModelInfo,
) -> ControlInput | None:
    """The ControlNet input of a request; None without one.

    Args:
        image: the control image.
        model: name of the ControlNet.
        params: the dialect's names of the fields for `image` and `model`.
        size: requested width and height.

    Raises:
        InvalidRequestError: the control image is missing or unreadable, the ControlNet is unknown, or the
            model does not support ControlNet.
    """
    image_param, model_param = params
    options = [name for name in CONTROL_FIELDS if getattr(fields, name) != CONTROL_FIELDS[name]]
    if image is None and model is None and not options:
        return None
    param = image_param if image is not None else model_param if model is not None else options[0]
    check_capability("control", param, model_info)
    if image is None:
        message = f"'{param}' needs a control image in '{image_param}'."
        raise InvalidRequestError(message, param=image_param, code="missing_required_parameter")
    names = model_info.controlnets
    if model is None and len(names) == 1:
        model = names[0]
    if model is None or model not in names:
        message = f"'{model_param}' must be one of this server's ControlNets: {', '.join(names)}."
        raise InvalidRequestError(message, param=model_param)
    if fields.control_guidance_start >= fields.control_guidance_end:
        message = "'control_guidance_start' must be less than 'control_guidance_end'."
        raise InvalidRequestError(message, param="control_guidance_start")
    data = image if isinstance(image, bytes) else from_base64(image, image_param)
    return ControlInput(
        model=model,
        image=to_input_image(decode(data, image_param), *size),
        preprocessor=fields.control_preprocessor,
        scale=fields.controlnet_conditioning_scale,
        start=fields.control_guidance_start,
        end=fields.control_guidance_end,
    )
