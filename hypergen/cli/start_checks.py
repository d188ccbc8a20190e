"""Checks before anything is imported, downloaded or loaded, so that a fault leaves nothing behind."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, replace
from pathlib import Path

from hypergen import optional_packages
from hypergen.argument_checks import ArgumentChecks
from hypergen.config import EngineSettings, ServerSettings, Settings
from hypergen.errors import SettingError, of_model, of_setting
from hypergen.images.content_credentials import load_credentials
from hypergen.images.storage import open_storage
from hypergen.model_families import servable
from hypergen.model_store import store
from hypergen.model_store.components import find_vae
from hypergen.model_store.diffusers_layout import PIPELINE_FILE
from hypergen.model_store.entries import store_folder
from hypergen.model_store.hub import HUB_ID, split_revision
from hypergen.model_store.lora_files import LoraRegistry, open_registry
from hypergen.model_store.safety_checkers import find_safety_checker
from hypergen.model_store.setting_checks import check_refiner, may_take_attention, no_attention_backends
from hypergen.resolve_models import argument_checks, entries_of, id_of, settings_of
from hypergen.served_model_config import ModelEntry


@dataclass(frozen=True, kw_only=True)
class CheckedModel:
    """A model of the settings, not imported.

    Attributes:
        folder: in diffusers' layout; None: it is a checkpoint file, or not on this machine.
        on_this_machine: it need not be downloaded.
    """

    name: str
    on_this_machine: bool
    entry: ModelEntry
    engine: EngineSettings
    folder: Path | None
    registry: LoraRegistry
    checks: ArgumentChecks

    def found_in(self, folder: Path) -> CheckedModel:
        """The same model, imported."""
        registry = open_registry(self.engine, folder)
        return replace(self, folder=folder, on_this_machine=True, registry=registry)


def check_models(settings: Settings) -> tuple[CheckedModel, ...]:
    """Check the models of the settings and their files.

    Raises:
        ConfigurationError: a setting is wrong.
        ModelError: a model does not exist or cannot be served.
    """
    store_folder()
    load_credentials(settings.engine)
    find_safety_checker(settings.engine.safety_checker, download=False)
    if settings.engine.quantization != "off":
        optional_packages.require("torchao", "quantization", settings.engine.quantization)
    entries = entries_of(settings)
    # With the paths as given, for the messages.
    open_registry(settings.engine, None)
    models: list[CheckedModel] = []
    for index, entry in enumerate(entries):
        with of_model(index):
            models.append(_check_model(entry, settings.engine, alone=len(entries) == 1))
    may_take = [model.folder is None or may_take_attention(model.folder) for model in models]
    if settings.engine.attention and not any(may_take):
        raise SettingError("attention", no_attention_backends(", ".join(model.name for model in models)))
    return tuple(models)


def _check_model(entry: ModelEntry, engine: EngineSettings, *, alone: bool) -> CheckedModel:
    own = settings_of(entry, engine)
    with of_setting("source"):
        folder = store.check_source(
            entry.source, single_file_config=entry.single_file_config, pipelines=servable()
        )
    checks = argument_checks(entry, own, alone=alone)
    refiner = entry.refiner or engine.refiner
    with of_setting("refiner"):
        refiner_folder = store.check_source(refiner) if refiner else None
    if folder is not None:
        checks.without_torch(folder)
    if refiner and refiner_folder is not None:
        with of_setting("refiner"):
            store.require_refiner(refiner, refiner_folder / PIPELINE_FILE)
        if folder is not None:
            check_refiner(refiner_folder, folder, refiner)
    if entry.vae is not None and not is_on_the_hub(entry.vae):
        find_vae(entry.vae)
    return CheckedModel(
        name=id_of(entry),
        entry=entry,
        engine=own,
        folder=folder,
        on_this_machine=folder is not None or not is_on_the_hub(str(entry.source)),
        registry=open_registry(own, folder),
        checks=checks,
    )


def is_on_the_hub(source: str) -> bool:
    """Whether it would be downloaded: no local path, but a hub id."""
    return not os.path.exists(os.path.expanduser(source)) and bool(
        HUB_ID.fullmatch(split_revision(source)[0])
    )


def check_storage(server: ServerSettings) -> None:
    """
    Raises:
        SettingError: `url` results cannot be stored.
    """
    open_storage(server).check()


def check_certificate(server: ServerSettings) -> None:
    """
    Raises:
        SettingError: the TLS certificate or its key cannot be used.
    """
    certificate, key = server.ssl_certfile, server.ssl_keyfile
    if certificate is None or key is None:
        return
    for setting, file in (("ssl_certfile", certificate), ("ssl_keyfile", key)):
        try:
            file.read_bytes()
        except OSError as error:
            raise SettingError(setting, f"{file} cannot be read: {error.strerror}.") from None
    try:
        # With a password, because otherwise OpenSSL asks for one on the terminal.
        ssl.create_default_context().load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise SettingError(
            "ssl_certfile",
            f"{certificate} and the key {key} must be a certificate and its key in PEM, without a password: "
            f"{getattr(error, 'reason', None) or error}.",
        ) from None
