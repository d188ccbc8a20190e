"""The model store: every served model is an entry of BentoML's store.

Models are imported from a folder, a checkpoint file or the hub.

Weights are hard links if the file system allows. Otherwise small models are copied, and large ones become
symbolic links to their folder. A Bento built from such an entry has the files, because BentoML follows links.
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
from hypergen.model_families import REFINER_PIPELINE
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
from hypergen.model_store.entries import StoredModel, import_lock, open_entry, store_folder, write_entry
from hypergen.model_store.hub import HUB_ID, download, resolve_hub_model
from hypergen.model_store.single_file import ReportProgress
from hypergen.served_model_config import ModelOptions

EMBEDDED_NAME = "hypergen-tiny"
EMBEDDED_FOLDER = Path(__file__).parents[1] / "embedded"

PipelineCheck = Callable[[Path], None]
FilesCheck = Callable[[Path], None]


def get_or_import(
    model: str | None,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    single_file_config: str | None = None,
    options: ModelOptions | None = None,
    pipelines: Collection[str] | None = None,
    check_files: FilesCheck | None = None,
    report_progress: ReportProgress | None = None,
) -> StoredModel:
    """Get a model from the store; a model that is not in the store is imported first.

    A stored hub model is used without a request to the hub. `import_model` checks the hub for a newer commit.

    Args:
        model: folder, checkpoint file, hub id or store tag; None is the embedded model.
        revision: branch, tag or commit of a hub model.
        dtype: "float16" and "bfloat16" prefer fp16 variants of weights.
        single_file_config: source of a single-file checkpoint's configuration, see `single_file`.
        options: of its served-model file, which the configuration may depend on.
        pipelines: supported pipeline classes; others are refused before their weights are downloaded.
        check_files: see `write_entry`; a model that it refuses does not stay in the store.
        report_progress: called with one line per stage, for example "Downloading ...".

    Raises:
        ModelError: the model is unknown, damaged or not supported.
    """
    check = partial(require_pipeline, model or EMBEDDED_NAME, pipelines)
    report_progress = report_progress or _ignore
    return _resolve(
        model,
        revision,
        dtype,
        single_file_config,
        check,
        report_progress,
        options,
        check_files,
        check_for_update=False,
    )


def import_model(
    source: str | None,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    single_file_config: str | None = None,
    check_files: FilesCheck | None = None,
    report_progress: ReportProgress | None = None,
) -> StoredModel:
    """Import the source's current state; an unchanged source is not imported again."""
    check = partial(require_pipeline, source or EMBEDDED_NAME, None)
    report_progress = report_progress or _ignore
    return _resolve(
        source,
        revision,
        dtype,
        single_file_config,
        check,
        report_progress,
        None,
        check_files,
        check_for_update=True,
    )


def get_or_import_refiner(
    refiner: str | None, *, dtype: str | None = None, report_progress: ReportProgress | None = None
) -> StoredModel | None:
    """`get_or_import` for the refiner in the settings; None without one.

    Raises:
        ModelError: also if it is not a refiner; for a hub model, before its weights are downloaded.
    """

    def check(pipeline_file: Path) -> None:
        found = pipeline_class_of(pipeline_file.parent, str(refiner))
        if found != REFINER_PIPELINE:
            raise ModelError(
                f"{refiner} is not a refiner: it must be a {REFINER_PIPELINE}, and is a {found}."
            )

    if refiner is None:
        return None
    report_progress = report_progress or _ignore
    return _resolve(refiner, None, dtype, None, check, report_progress, check_for_update=False)


def local_folder(model: str | None) -> Path | None:
    """The folder of a model that is on this machine; None if it must be downloaded."""
    if model is None or model == EMBEDDED_NAME:
        return EMBEDDED_FOLDER
    if os.path.isdir(path := os.path.expanduser(model)):
        return Path(path)
    with suppress(ModelError):
        return find_by_tag(model).path
    return next((stored.path for stored in list_models() if stored.source == model), None)


def find_by_tag(tag: str) -> StoredModel:
    """Look up "name:version", "name:latest" or "name"; the latest is the newest undamaged entry."""
    name, _, version = tag.lower().partition(":")
    if version not in ("", "latest") and (store_folder() / name / version).is_dir():
        return open_entry(f"{name}:{version}")
    versions = [stored for stored in list_models() if stored.tag.startswith(f"{name}:")]
    if version not in ("", "latest") or not versions:
        raise ModelError(_unknown(tag))
    return versions[0]


def list_models() -> list[StoredModel]:
    """Every undamaged model of the store in diffusers layout, newest first."""
    found: list[StoredModel] = []
    for folder in store_folder().glob("*/*/"):
        with suppress(ModelError):
            found.append(open_entry(f"{folder.parent.name}:{folder.name}"))
    return sorted(found, key=lambda stored: stored.created, reverse=True)


def _resolve(
    given: str | None,
    revision: str | None,
    dtype: str | None,
    single_file_config: str | None,
    check: PipelineCheck,
    report_progress: ReportProgress,
    options: ModelOptions | None = None,
    check_files: FilesCheck | None = None,
    *,
    check_for_update: bool,
) -> StoredModel:
    prefer_fp16 = dtype in ("float16", "bfloat16")
    path = os.path.expanduser(given or "")  # Path.expanduser raises for unknown users
    if given is None or given == EMBEDDED_NAME:
        stored = _import_folder(EMBEDDED_FOLDER, EMBEDDED_NAME, prefer_fp16, report_progress)
    elif os.path.isdir(path):
        stored = _import_folder(Path(path), given, prefer_fp16, report_progress, check_files)
    elif os.path.isfile(path):
        stored = _import_single_file(
            given, single_file_config, options, prefer_fp16, report_progress, check_files
        )
    elif given.endswith(single_file.SUFFIX):
        raise ModelError(f"No such file: {given}")
    elif given.startswith(("/", ".", "~")):
        raise ModelError(f"No such folder: {given}")
    elif "/" not in given:
        stored = find_by_tag(given)
    elif HUB_ID.fullmatch(given):
        stored = None if check_for_update else _find_hub_model(given, revision, prefer_fp16)
        stored = stored or _import_hub_model(
            given, revision, prefer_fp16, check, report_progress, check_files
        )
    else:
        raise ModelError(_unknown(given))
    if single_file_config is not None and not (stored.path / CHECKPOINT).is_file():
        raise ModelError(f"--single-file-config is only for single-file checkpoints; {given} is not one.")
    check_folder(stored.path)
    check(stored.path / PIPELINE_FILE)
    return stored


def _import_folder(
    folder: Path,
    source: str,
    prefer_fp16: bool,
    report_progress: ReportProgress,
    check_files: FilesCheck | None = None,
) -> StoredModel:
    check_folder(folder)
    folder = folder.resolve()
    selection = select_in_folder(folder, prefer_fp16=prefer_fp16)
    is_embedded = source == EMBEDDED_NAME
    version = digest(folder, selection, of_contents=is_embedded)
    name = EMBEDDED_NAME if is_embedded else _store_name(folder.name)
    stored = _import(f"{name}:{version}", source, folder, selection, {}, report_progress, check_files)
    return replace(stored, source=source)


def _import_single_file(
    given: str,
    configuration: str | None,
    options: ModelOptions | None,
    prefer_fp16: bool,
    report_progress: ReportProgress,
    check_files: FilesCheck | None,
) -> StoredModel:
    folder, selection = single_file.select(
        given, configuration, options or ModelOptions(), prefer_fp16, local_folder, report_progress
    )
    file = Path(selection.files[CHECKPOINT])
    tag = f"{_store_name(file.stem)}:{digest(folder, selection, of_contents=False)}"
    stored = _import(tag, given, folder, selection, {"origin": str(file)}, report_progress, check_files)
    return replace(stored, source=given)


def _import_hub_model(
    repo: str,
    revision: str | None,
    prefer_fp16: bool,
    check: PipelineCheck,
    report_progress: ReportProgress,
    check_files: FilesCheck | None,
) -> StoredModel:
    report_progress(f"Looking up {repo} on the hub")
    model = resolve_hub_model(repo, revision=revision, prefer_fp16=prefer_fp16, check=check)
    version = model.commit[:12] + ("-fp16" if model.selection.fp16 == "taken" else "")
    tag = f"{_store_name(repo)}:{version}"
    with suppress(ModelError):
        return open_entry(tag)
    report_progress(
        f"Downloading {repo}: {len(model.selection.files)} files, {model.size_bytes / 1e9:.1f} GB"
    )
    # The keys and values are stored in existing entries, so they must not change.
    metadata = {"revision": model.commit, "asked_revision": revision or "", "fp16": model.selection.fp16}
    return _import(tag, repo, download(model), model.selection, metadata, report_progress, check_files)


def _find_hub_model(repo: str, revision: str | None, prefer_fp16: bool) -> StoredModel | None:
    import bentoml

    for stored in list_models():
        metadata = bentoml.models.get(stored.tag).info.metadata
        if stored.source != repo or "revision" not in metadata:
            continue
        revisions = [metadata["asked_revision"]] + ([metadata["revision"]] if revision else [])
        has_dtype = metadata["fp16"] == "none" or (metadata["fp16"] == "taken") == prefer_fp16
        if (revision or "") in revisions and has_dtype:
            return stored
    return None


def _import(
    tag: str,
    source: str,
    folder: Path,
    selection: Selection,
    metadata: dict[str, Any],
    report_progress: ReportProgress,
    check_files: FilesCheck | None,
) -> StoredModel:
    """Write the entry unless it exists; only one of several processes does so."""
    with suppress(ModelError):
        return open_entry(tag)
    name = tag.partition(":")[0]
    try:
        with import_lock(name, report_progress):
            with suppress(ModelError):
                return open_entry(tag)
            report_progress(f"Importing {source} as {tag}")
            metadata = {"source": source, "origin": str(folder), **metadata}
            write_entry(tag, folder, selection, metadata, check_files)
    except OSError as error:
        raise ModelError(f"{source} cannot be imported: {error}") from error
    return open_entry(tag)


def _ignore(_: str) -> None:
    """No progress reports."""


def _store_name(given: str) -> str:
    """A name that BentoML allows: [a-z0-9._-], at most 63 letters. The embedded model's name is reserved."""
    name = re.sub(r"[^a-z0-9._-]+", "-", given.lower().replace("/", "--")).strip("._-") or "model"
    if len(name) > 63:
        name = f"{name[:54]}-{hashlib.sha256(given.encode()).hexdigest()[:8]}"
    return f"{name}-folder" if name == EMBEDDED_NAME else name


def _unknown(given: str) -> str:
    tags = [stored.tag for stored in list_models()]
    known_tags = f"it has {', '.join(tags[:5])}{' ...' if len(tags) > 5 else ''}" if tags else "it is empty"
    accepted = f"a hub id (owner/name), a folder, or a tag of the model store (name:version; {known_tags})"
    return f"Unknown model '{given}': it must be {accepted}."
