"""What the HTTP process knows of a served model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# What not every family can do, by the field of `GenerationRequest` that asks for it.
Option = Literal[
    "prompt_2", "negative_prompt", "true_cfg_scale", "enable_refiner", "image", "mask", "control", "loras"
]


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """What a request gets that does not say."""

    num_inference_steps: int
    guidance_scale: float
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What the HTTP half knows about a loaded model; dialects check requests against it and nothing else."""

    id: str
    family: str
    defaults: ModelDefaults
    samplers: dict[str, int]  # public name -> fewest steps it can do
    min_steps: int  # of the scheduler that the model was published with
    device: str
    dtype: str
    options: frozenset[Option] = frozenset()
    loras: tuple[str, ...] = ()  # names that requests may use
    lora_folders: tuple[str, ...] = ()  # whose files they may give by path
    default_lora: str | None = None  # for requests that name none
    max_loras: int = 0  # in one request
    control_models: tuple[str, ...] = ()
