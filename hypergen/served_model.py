"""A model that a server was told to serve, found and ready to be loaded; both halves know it by this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypergen.config import EngineSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """Where it lies and what is special about it.

    Attributes:
        id: as in /v1/models.
        aliases: other names that requests may use.
        tags: of its entry in the model store, and of its refiner's if it has one.
        path: the entry's folder, in diffusers layout.
        settings: the server's, with the LoRAs, control models and refiner of this model.
        defaults: what requests get that do not say, by the fields of `ModelDefaults`.
    """

    id: str
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    path: Path
    settings: EngineSettings
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def is_called(self, name: str) -> bool:
        """Whether a request that names a model means this one; case does not matter."""
        return name.casefold() in {known.casefold() for known in (self.id, *self.aliases)}
