"""A served model, resolved and ready to load, for the HTTP process and the engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypergen.config import EngineSettings
from hypergen.served_model_config import ModelOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The folder, names and settings of a served model.

    Attributes:
        id: id in /v1/models.
        aliases: other names for requests.
        tags: model-store tags of the model and, if it has one, of its refiner.
        path: the model's folder, in diffusers layout.
        settings: the engine settings with the LoRAs, ControlNets and refiner of this model.
        defaults: field of `ModelDefaults` -> value for requests without it.
        options: of its served-model file; `vae` is an absolute path.
    """

    id: str
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    path: Path
    settings: EngineSettings
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    options: ModelOptions = field(default_factory=ModelOptions)

    def is_called(self, name: str) -> bool:
        """Whether `name` is the id or an alias, ignoring case."""
        return name.casefold() in {known.casefold() for known in (self.id, *self.aliases)}
