"""The model store: everything that is served lies in BentoML's store, imported from a folder or the hub.

Weights are hard links where the file system allows; else copies when the model is small; else symbolic links,
which serve a large model where it lies (a Bento built from such an entry still gets the files: BentoML
follows links).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hypergen.errors import ModelError
from hypergen.model_store import single_file
from hypergen.model_store.diffusers_layout import (
    CHECKPOINT,
    PIPELINE_FILE,
    Selection,
    digest,
    pipeline_class_of,
    require_pipeline,
    select_in_folder,
)
from hypergen.model_store.diffusers_layout import check_folder as check_folder
from hypergen.model_store.entries import StoredModel, build, lock, read, store_folder
from hypergen.model_store.hub import HUB_ID, download, look_up

EMBEDDED_NAME = "hypergen-tiny"
EMBEDDED_FOLDER = Path(__file__).parents[1] / "embedded"
_REFINER = "StableDiffusionXLImg2ImgPipeline"

Progress = Callable[[str], None]
PipelineCheck = Callable[[Path], None]


def ensure(
    model: str | None,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    single_file_config: str | None = None,
    pipelines: Collection[str] | None = None,
    progress: Progress | None = None,
) -> StoredModel:
    """Get a model from the store, importing it first where it is not there.

    A hub model that is in the store is taken as it is, without asking the hub; `import_model` asks.

    Args:
        revision: of a hub model: branch, tag or commit; other kinds of model have none.
        dtype: "float16" and "bfloat16" prefer fp16 variants of weights.
        single_file_config: what a checkpoint in one file takes its configuration from, see `single_file`.
        pipelines: the pipeline classes that can be served; others are refused, before their weights are
            downloaded.
    """
    check = partial(require_pipeline, model or EMBEDDED_NAME, pipelines)
    say = progress or (lambda _: None)
    return _resolve(model, revision, dtype, single_file_config, check, say, ask_hub=False)


def import_model(
    source: str | None,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    single_file_config: str | None = None,
    progress: Progress | None = None,
) -> StoredModel:
    """Bring the source's present state into the store; what is there already is not copied again."""
    check = partial(require_pipeline, source or EMBEDDED_NAME, None)
    say = progress or (lambda _: None)
    return _resolve(source, revision, dtype, single_file_config, check, say, ask_hub=True)


def ensure_refiner(
    refiner: str | None, *, dtype: str | None = None, progress: Progress | None = None
) -> StoredModel | None:
    """Get the refiner of the settings from the store like a model, if there is to be one.

    Raises:
        ModelError: also when it is no refiner; of a hub model that is known before its weights are fetched.
    """

    def check(pipeline_file: Path) -> None:
        found = pipeline_class_of(pipeline_file.parent, str(refiner))
        if found != _REFINER:
            raise ModelError(f"{refiner} is a {found}, and no refiner, which is a {_REFINER}.")

    if refiner is None:
        return None
    return _resolve(refiner, None, dtype, None, check, progress or (lambda _: None), ask_hub=False)


def local_folder(model: str | None) -> Path | None:
    """Where the files of a model lie on this machine; None: it would have to be downloaded first."""
    if model is None or model == EMBEDDED_NAME:
        return EMBEDDED_FOLDER
    if os.path.isdir(path := os.path.expanduser(model)):
        return Path(path)
    with suppress(ModelError):
        return find(model).path
    return next((stored.path for stored in list_models() if stored.source == model), None)


def find(tag: str) -> StoredModel:
    """Look up "name:version", "name:latest" or "name"; the latest is the newest whole entry."""
    name, _, version = tag.lower().partition(":")
    if version not in ("", "latest") and (store_folder() / name / version).is_dir():
        return read(f"{name}:{version}")
    versions = [stored for stored in list_models() if stored.tag.startswith(f"{name}:")]
    if version not in ("", "latest") or not versions:
        raise ModelError(_unknown(tag))
    return versions[0]


def list_models() -> list[StoredModel]:
    """Every whole model of the store in diffusers layout, newest first."""
    found: list[StoredModel] = []
    for folder in store_folder().glob("*/*/"):
        with suppress(ModelError):
            found.append(read(f"{folder.parent.name}:{folder.name}"))
    return sorted(found, key=lambda stored: stored.created, reverse=True)


def _resolve(
    given: str | None,
    revision: str | None,
    dtype: str | None,
    single_file_config: str | None,
    check: PipelineCheck,
    say: Progress,
    *,
    ask_hub: bool,
) -> StoredModel:
    half = dtype in ("float16", "bfloat16")
    path = os.path.expanduser(given or "")  # Path.expanduser raises for unknown users
    if given is None or given == EMBEDDED_NAME:
        stored = _import_folder(EMBEDDED_FOLDER, EMBEDDED_NAME, half, say)
    elif os.path.isdir(path):
        stored = _import_folder(Path(path), given, half, say)
    elif os.path.isfile(path):
        stored = _import_single_file(given, single_file_config, half, say)
    elif given.endswith(single_file.SUFFIX):
        raise ModelError(f"No such file: {given}")
    elif given.startswith(("/", ".", "~")):
        raise ModelError(f"No such folder: {given}")
    elif "/" not in given:
        stored = find(given)
    elif HUB_ID.fullmatch(given):
        stored = None if ask_hub else _find_hub_model(given, revision, half)
        stored = stored or _import_hub_model(given, revision, half, check, say)
    else:
        raise ModelError(_unknown(given))
    if single_file_config is not None and not (stored.path / CHECKPOINT).is_file():
        raise ModelError(f"--single-file-config is for a model in one file, which {given} is not.")
    check_folder(stored.path)
    check(stored.path / PIPELINE_FILE)
    return stored


def _import_folder(folder: Path, source: str, half: bool, say: Progress) -> StoredModel:
    check_folder(folder)
    folder = folder.resolve()
    selection = select_in_folder(folder, half=half)
    embedded = source == EMBEDDED_NAME
    version = digest(folder, selection, of_contents=embedded)
    name = EMBEDDED_NAME if embedded else _store_name(folder.name)
    stored = _import(f"{name}:{version}", source, folder, selection, {}, say)
    return replace(stored, source=source)


def _import_single_file(given: str, configuration: str | None, half: bool, say: Progress) -> StoredModel:
    folder, selection = single_file.select(given, configuration, half, local_folder, say)
    file = Path(selection.files[CHECKPOINT])
    tag = f"{_store_name(file.stem)}:{digest(folder, selection, of_contents=False)}"
    stored = _import(tag, given, folder, selection, {"origin": str(file)}, say)
    return replace(stored, source=given)


def _import_hub_model(
    repo: str, revision: str | None, half: bool, check: PipelineCheck, say: Progress
) -> StoredModel:
    say(f"Asking the hub about {repo}")
    model = look_up(repo, revision=revision, half=half, check=check)
    version = model.commit[:12] + ("-fp16" if model.selection.fp16 == "taken" else "")
    tag = f"{_store_name(repo)}:{version}"
    with suppress(ModelError):
        return read(tag)
    say(f"Downloading {repo}: {len(model.selection.files)} files, {model.size_bytes / 1e9:.1f} GB")
    metadata = {"revision": model.commit, "asked_revision": revision or "", "fp16": model.selection.fp16}
    return _import(tag, repo, download(model), model.selection, metadata, say)


def _find_hub_model(repo: str, revision: str | None, half: bool) -> StoredModel | None:
    import bentoml

    for stored in list_models():
        metadata = bentoml.models.get(stored.tag).info.metadata
        if stored.source != repo or "revision" not in metadata:
            continue
        revisions = [metadata["asked_revision"]] + ([metadata["revision"]] if revision else [])
        suits = metadata["fp16"] == "none" or (metadata["fp16"] == "taken") == half
        if (revision or "") in revisions and suits:
            return stored
    return None


def _import(
    tag: str, source: str, folder: Path, selection: Selection, metadata: dict[str, Any], say: Progress
) -> StoredModel:
    """Make the entry once, however many processes ask for it at the same time."""
    with suppress(ModelError):
        return read(tag)
    name = tag.partition(":")[0]
    try:
        with lock(name, say):
            with suppress(ModelError):
                return read(tag)
            say(f"Importing {source} as {tag}")
            build(tag, folder, selection, {"source": source, "origin": str(folder), **metadata})
    except OSError as error:
        raise ModelError(f"{source} cannot be imported: {error}") from error
    return read(tag)


def _store_name(given: str) -> str:
    """What BentoML allows as a name: [a-z0-9._-], at most 63, and not the embedded model's own."""
    name = re.sub(r"[^a-z0-9._-]+", "-", given.lower().replace("/", "--")).strip("._-") or "model"
    if len(name) > 63:
        name = f"{name[:54]}-{hashlib.sha256(given.encode()).hexdigest()[:8]}"
    return f"{name}-folder" if name == EMBEDDED_NAME else name


def _unknown(given: str) -> str:
    tags = [stored.tag for stored in list_models()]
    has = f"it has {', '.join(tags[:5])}{' ...' if len(tags) > 5 else ''}" if tags else "it is empty"
    would_work = f"a hub id (owner/name), a folder, or a tag of the model store (name:version; {has})"
    return f"Unknown model '{given}': give {would_work}."
