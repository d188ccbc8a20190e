"""`hypergen check`: what a file of settings would serve, without loading or downloading a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

from pydantic import BaseModel

from hypergen.api.api_keys import ApiKeys
from hypergen.cli.start_checks import CheckedModel, check_certificate, check_models, check_storage
from hypergen.config import ServerSettings, Settings
from hypergen.errors import ModelError, of_model
from hypergen.load_settings import load_named_settings, read_file
from hypergen.model_store.diffusers_layout import pipeline_class_of
from hypergen.model_store.sources import EMBEDDED_FOLDER
from hypergen.served_model_config import ModelEntry

# A row of the output.
Row = tuple[str, str]


def check(file: Path, environment: Mapping[str, str]) -> Iterator[Row]:
    """Rows about what would be served, each as soon as it is checked.

    Raises:
        ConfigurationError: a setting of the file or of the environment is wrong.
        ModelError: a model does not exist or cannot be served.
    """
    if _is_served_model(file):
        settings, names = load_named_settings(None, environment, {"models": (str(file),)})
    else:
        settings, names = load_named_settings(file, environment)
    with names.in_messages(settings):
        yield from _check(settings)


def _check(settings: Settings) -> Iterator[Row]:
    from hypergen.app import check_shared_store  # its packages would slow down every other command

    keys = ApiKeys(settings.server)
    check_certificate(settings.server)
    check_shared_store(settings.server)
    check_storage(settings.server)
    for index, model in enumerate(check_models(settings)):
        with of_model(index):
            yield from _describe(model)
    if settings.server.storage:
        yield "storage", settings.server.storage
    yield "address", _address(settings.server)
    yield "API keys", "yes" if keys else "none: who can reach the server can use it"


def _is_served_model(file: Path) -> bool:
    """Whether most names in a file are those of a served-model file, and not of a file for --config."""
    names = [str(name) for name in read_file(file)]

    def known(fields: type[BaseModel]) -> int:
        return sum(bool(get_close_matches(name, fields.model_fields, 1, 0.75)) for name in names)

    return known(ModelEntry) > known(Settings)


def _describe(model: CheckedModel) -> Iterator[Row]:
    entry = model.entry
    yield "model", model.name
    if entry.aliases:
        yield "aliases", ", ".join(entry.aliases)
    if model.folder is not None:
        if model.folder.resolve() != EMBEDDED_FOLDER:
            try:
                model.checks.with_torch(model.folder)
            except ModelError as error:
                raise ModelError(f"{entry.source}: {error}") from None
        yield "pipeline", pipeline_class_of(model.folder, model.name)
    else:
        yield (
            "source",
            "a checkpoint file" if model.on_this_machine else "the hub, downloaded when served",
        )
    for name, found in (
        ("LoRAs", model.registry.files),
        ("ControlNets", model.engine.controlnet),
        ("embeddings", model.engine.embedding),
    ):
        if found:
            yield name, ", ".join(sorted(found))


def _address(server: ServerSettings) -> str:
    return f"{'https' if server.ssl_certfile else 'http'}://{server.host}:{server.port}{server.root_path}"
