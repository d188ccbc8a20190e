"""Resolve the models in the settings to entries of the model store."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypergen.argument_checks import ArgumentChecks
from hypergen.config import EngineSettings, Settings
from hypergen.engine_client.accelerators import has_gpu
from hypergen.errors import ConfigurationError, HyperGenError, ModelError, SettingError, of_model, of_setting
from hypergen.model_families import servable
from hypergen.model_store import store
from hypergen.model_store.attention_kernels import provide_attention_kernel
from hypergen.model_store.components import (
    download_controlnets,
    find_controlnets,
    find_embeddings,
    find_vae,
)
from hypergen.model_store.entries import StoredModel
from hypergen.model_store.lora_files import open_registry, with_absolute_path
from hypergen.model_store.model_check import refuse_unusable
from hypergen.model_store.safety_checkers import find_safety_checker
from hypergen.model_store.setting_checks import check_refiner
from hypergen.served_model import ServedModel
from hypergen.served_model_config import ModelEntry


def find_models(
    settings: Settings,
    report_progress: Callable[[str], None] | None = None,
    *,
    check_files: Callable[[Path], None] | None = None,
    loras: Collection[str] = (),
    check_stored: bool = False,
) -> tuple[ServedModel, ...]:
    """All models of the settings, imported into the store if necessary; the first is the default.

    The kernel of an attention backend is fetched too. If a model is refused, none stays that was not in the
    store before.

    Args:
        check_files: further checks of a model's folder before it is added to the store.
        loras: names of those of a request, which are checked too.
        check_stored: also check what needs torch and takes seconds, of models that are in the store already.

    Raises:
        ConfigurationError: see `entries_of`.
        ModelError: a model cannot be found, read or served.
        SettingError: it cannot be served with these settings, or a file of them cannot be found.
    """
    provide_attention_kernel(settings.engine.attention, report_progress)
    entries = entries_of(settings)
    before = {stored.tag for stored in store.list_models()}
    found: list[str] = []
    models: list[ServedModel] = []
    try:
        for index, entry in enumerate(entries):
            with of_model(index):
                engine = settings_of(entry, settings.engine)
                checks = argument_checks(
                    entry, engine, alone=len(entries) == 1, more=check_files, loras=loras
                )
                models.append(_find_model(entry, checks, found, report_progress, check_stored=check_stored))
    except HyperGenError:
        for tag in set(found) - before:
            with suppress(ModelError):  # it must not hide why the model was refused
                store.remove_entry(tag)
        raise
    return _with_store_names(models)


def _find_model(
    entry: ModelEntry,
    checks: ArgumentChecks,
    found: list[str],
    report_progress: Callable[[str], None] | None,
    *,
    check_stored: bool,
) -> ServedModel:
    """
    Args:
        found: the tags of the model and its refiner are added.
    """
    engine = checks.engine
    stored = store.get_or_import(
        entry.source,
        revision=entry.revision,
        prefer_fp16=prefers_fp16(engine),
        single_file_config=entry.single_file_config,
        options=entry.options,
        pipelines=servable(),
        check_files=checks.before_import,
        report_progress=report_progress,
    )
    found.append(stored.tag)
    if not checks.is_done:
        checks.without_torch(stored.path)
    refiner = _find_refiner(engine, stored.path, report_progress)
    if refiner:
        found.append(refiner.tag)
    checker = find_safety_checker(engine.safety_checker, report_progress)
    # Engines use folders, not the store or the hub.
    folders = download_controlnets(
        engine.controlnet, stored.path, report_progress, prefer_fp16=prefers_fp16(engine)
    )
    engine = engine.model_copy(
        update={
            "safety_checker": checker,
            "controlnet": folders,
            "refiner": str(refiner.path) if refiner else None,
        }
    )
    open_registry(engine, stored.path)  # reports missing files now, not in the engine
    options = entry.options.model_copy(update={"vae": find_vae(entry.vae, stored.path)})
    checks = replace(checks, options=options, engine=engine)
    if check_stored and not checks.is_done:
        checks.with_torch(stored.path, is_stored=True)
    return ServedModel(
        id=id_of(entry),
        aliases=entry.aliases,
        tags=(stored.tag, *([refiner.tag] if refiner else [])),
        path=stored.path,
        settings=engine,
        defaults=entry.defaults.model_dump(exclude_none=True),
        options=options,
    )


def argument_checks(
    entry: ModelEntry,
    engine: EngineSettings,
    *,
    alone: bool,
    more: Callable[[Path], None] | None = None,
    loras: Collection[str] = (),
) -> ArgumentChecks:
    """
    Args:
        engine: from `settings_of`.
        alone, more, loras: see `ArgumentChecks`.
    """
    engine = engine.model_copy(update={"refiner": entry.refiner or engine.refiner})
    return ArgumentChecks(id_of(entry), entry.options, engine, alone, more, loras)


def _find_refiner(
    engine: EngineSettings, base: Path, report_progress: Callable[[str], None] | None
) -> StoredModel | None:
    given = engine.refiner

    def check(folder: Path) -> None:
        check_refiner(folder, base, str(given))
        with of_setting("refiner", str(given)):
            refuse_unusable(folder)

    with of_setting("refiner"):
        refiner = store.get_or_import_refiner(
            given, prefer_fp16=prefers_fp16(engine), check_files=check, report_progress=report_progress
        )
    if refiner is not None:
        check_refiner(refiner.path, base, str(given))
    return refiner


def prefers_fp16(engine: EngineSettings) -> bool:
    """Whether fp16 files are enough, because the model runs in 16 bits: by its dtype, else on every GPU."""
    return has_gpu(engine.device_type) if engine.dtype is None else engine.dtype != "float32"


def resolved_entries(settings: Settings, models: tuple[ServedModel, ...]) -> tuple[ModelEntry, ...]:
    """The models as entries for a process with another working folder: tags and absolute paths."""
    return tuple(
        ModelEntry(
            source=model.tags[0],
            name=model.id,
            aliases=model.aliases,
            defaults=entry.defaults,
            **model.options.model_dump(),
            loras={
                name: str(Path(file).expanduser().absolute()) if file else None
                for name, file in entry.loras.items()
            },
            controlnet=find_controlnets(entry.controlnet),
            embeddings=find_embeddings(entry.embeddings),
            refiner=next(iter(model.tags[1:]), None),
        )
        for entry, model in zip(entries_of(settings), models, strict=True)
    )


def resolved_flags(engine: EngineSettings) -> dict[str, Any]:
    """The flags with paths, as absolute ones, for a process with another working folder."""
    return {
        "lora": tuple(with_absolute_path(given) for given in engine.lora),
        "lora_dir": tuple(folder.expanduser().absolute() for folder in engine.lora_dir),
        "safety_checker": find_safety_checker(engine.safety_checker),
        **{
            name: file.expanduser().absolute()
            for name in ("c2pa_certificate", "c2pa_key")
            if (file := getattr(engine, name)) is not None
        },
        "controlnet": find_controlnets(engine.controlnet) or None,
        "embedding": find_embeddings(engine.embedding) or None,
    }


def entries_of(settings: Settings) -> tuple[ModelEntry, ...]:
    """The entry of each model, with the flags for a single model merged in.

    Raises:
        SettingError: one for a single model is ambiguous, because several are served.
        ConfigurationError: two models have the same name.
    """
    entries = settings.models or (ModelEntry(),)
    if len(entries) == 1:
        of_entry = {
            "name": settings.served_model_name,
            "revision": settings.revision,
            "single_file_config": settings.single_file_config,
        }
        return (entries[0].model_copy(update={name: value for name, value in of_entry.items() if value}),)
    for section, settings_of_one in (
        (settings, ("served_model_name", "revision", "single_file_config")),
        (settings.engine, ("lora", "controlnet", "embedding", "refiner")),
    ):
        for name in settings_of_one:
            if getattr(section, name):
                raise SettingError(
                    name, "applies to one model, but several are served; put it into a served-model file."
                )
    _refuse_equal_names(entries)
    return entries


def id_of(entry: ModelEntry) -> str:
    """The model's id in /v1/models."""
    return entry.name or entry.source or store.EMBEDDED_NAME


def settings_of(entry: ModelEntry, engine: EngineSettings) -> EngineSettings:
    """The engine settings with what the entry of this model adds to them, except for its refiner."""
    loras = tuple(f"{name}={file}" for name, file in entry.loras.items() if file)
    return engine.model_copy(
        update={
            "lora": (*(with_absolute_path(given) for given in engine.lora), *loras),
            "controlnet": find_controlnets({**engine.controlnet, **entry.controlnet}),
            "embedding": find_embeddings({**engine.embedding, **entry.embeddings}),
        }
    )


def _with_store_names(models: list[ServedModel]) -> tuple[ServedModel, ...]:
    """The models, whose names in the store are aliases too, unless they name several."""
    store_names = [model.tags[0].partition(":")[0] for model in models]
    taken = [name.casefold() for model in models for name in (model.id, *model.aliases)]
    return tuple(
        model if [*taken, *store_names].count(name) > 1 else replace(model, aliases=(*model.aliases, name))
        for model, name in zip(models, store_names, strict=True)
    )


def _refuse_equal_names(entries: tuple[ModelEntry, ...]) -> None:
    taken: set[str] = set()
    for entry in entries:
        names = {name.casefold() for name in (id_of(entry), *entry.aliases)}
        if names & taken:
            raise ConfigurationError(
                f"Two models have the name '{sorted(names & taken)[0]}'; change one of them."
            )
        taken |= names
