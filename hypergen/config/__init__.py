"""Settings: loaded once by `load_settings`, then immutable and passed as arguments.

A setting is a field with a description. Its flag and environment variable follow from the field's name:
`queue_timeout_s` is `--queue-timeout` and `HYPERGEN_QUEUE_TIMEOUT`. The field's name and description have
the unit.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, Field

from hypergen.served_model_config import ModelEntry, read_entries

from .engine import EngineSettings
from .queue import QueueSettings
from .server import ServerSettings

__all__ = ["EngineSettings", "QueueSettings", "ServerSettings", "Settings"]


class Settings(BaseModel, frozen=True, extra="forbid"):
    """All settings of one server."""

    models: Annotated[tuple[ModelEntry, ...], BeforeValidator(read_entries)] = Field(
        (),
        description="models to serve: hub id, folder, .safetensors checkpoint, model-store tag, served-model "
        "file or the fields of one; absent: the embedded model",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    single_file_config: str | None = Field(
        None,
        description="folder, hub id or store tag with the configuration, vocabularies and missing components "
        "of a single-file checkpoint; absent: searched next to the file, in the store and on the hub",
    )
    served_model_name: str | None = Field(
        None, description="id of the model in /v1/models; absent: MODEL as given"
    )
    engine: EngineSettings = Field(default_factory=lambda: EngineSettings.model_validate({}))
    queue: QueueSettings = Field(default_factory=lambda: QueueSettings.model_validate({}))
    server: ServerSettings = Field(default_factory=lambda: ServerSettings.model_validate({}))
