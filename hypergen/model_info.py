"""What the HTTP process knows about a served model."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

# Capabilities that not every family has, named after the field of `GenerationRequest` that uses them.
Capability = Literal[
    "prompt_2",
    "negative_prompt",
    "clip_skip",
    "true_cfg_scale",
    "enable_refiner",
    "image",
    "mask",
    "control",
    "loras",
]


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """Values for the fields that a request leaves out."""

    num_inference_steps: int
    guidance_scale: float
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The words of a model that knows only a few.

    Attributes:
        words: lower case.
        unknown_prompt: what the model understands of a prompt without any of these words.
    """

    words: frozenset[str]
    unknown_prompt: str

    @classmethod
    def of_card(cls, model_card: dict[str, Any]) -> Vocabulary | None:
        """`vocabulary` in the model's `hypergen.json`; None: the model is not limited to some words."""
        if (fields := model_card.get("vocabulary")) is None:
            return None
        return cls(frozenset(fields["words"]), fields["unknown_prompt"])

    def understood(self, prompt: str) -> str | None:
        """`unknown_prompt` if the prompt has no known word, else None."""
        is_unknown = self.words.isdisjoint(re.findall(r"[^\W_]+", prompt.lower()))
        return self.unknown_prompt if is_unknown else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The properties of a loaded model; dialects validate requests against them alone."""

    id: str
    family: str
    defaults: ModelDefaults
    samplers: dict[str, int]  # public name -> minimum number of steps
    min_steps: int  # of the model's own scheduler
    device: str
    dtype: str
    capabilities: frozenset[Capability] = frozenset()
    loras: tuple[str, ...] = ()  # names for requests
    lora_folders: tuple[str, ...] = ()  # folders whose files requests may name by path
    default_lora: str | None = None  # for requests without one
    max_loras: int = 0  # in one request
    controlnets: tuple[str, ...] = ()
    schedules: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])  # of samplers
    vocabulary: Vocabulary | None = None
