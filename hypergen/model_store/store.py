"""The model store: every served model is an entry of BentoML's store.

Models are imported from a folder, a checkpoint file or the hub.

Weights are hard links if the file system allows. Otherwise small models are copied, and large ones become
symbolic links to their folder. A Bento built from such an entry has the files, because BentoML follows links.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
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
from hypergen.model_store.entries import StoredModel, import_lock, open_entry, write_entry
from hypergen.model_store.entries import find_by_tag as find_by_tag
from hypergen.model_store.entries import list_models as list_models
from hypergen.model_store.entries import remove_entry as remove_entry
from hypergen.model_store.hub import download, linked, resolve_hub_model, write_headers
from hypergen.model_store.single_file import Check, ReportProgress
from hypergen.model_store.sources import EMBEDDED_FOLDER as EMBEDDED_FOLDER
from hypergen.model_store.sources import EMBEDDED_NAME as EMBEDDED_NAME
from hypergen.model_store.sources import check_source as check_source
from hypergen.model_store.sources import kind_of
from hypergen.model_store.sources import local_folder as local_folder
from hypergen.served_model_config import ModelOptions


def _ignore(_: object) -> None:
    """No checks, and no progress reports."""


@dataclass(frozen=True, kw_only=True)
class _Import:
    """How a model is found and imported; see `get_or_import`.

    Attributes:
        check_pipeline: raises a ModelError if the model of a `model_index.json` cannot be served.
        check_for_update: look for a newer commit of a hub model that is in the store.
    """

    check_pipeline: Check
    check_files: Check = _ignore
    report_progress: ReportProgress = _ignore
    revision: str | None = None
    prefer_fp16: bool = False
    single_file_config: str | None = None
    options: ModelOptions = field(default_factory=ModelOptions)
    check_for_update: bool = False


def get_or_import(
    model: str | None,
    *,
    revision: str | None = None,
    prefer_fp16: bool = False,
    single_file_config: str | None = None,
    options: ModelOptions | None = None,
    pipelines: Collection[str] | None = None,
    check_files: Check | None = None,
    report_progress: ReportProgress | None = None,
) -> StoredModel:
    """Get a model from the store; a model that is not in the store is imported first.

    A stored hub model is used without a request to the hub. `import_model` checks the hub for a newer commit.

    Args:
        model: folder, checkpoint file, hub id or store tag; None is the embedded model.
        revision: branch, tag or commit of a hub model.
        prefer_fp16: select fp16 variants of weights where there are any. Without them, and of a stored hub
            model, the other files serve too.
        single_file_config: source of a single-file checkpoint's configuration, see `single_file`.
        options: of its served-model file, which the configuration may depend on.
        pipelines: supported pipeline classes; others are refused before their weights are downloaded.
        check_files: raises a ModelError if the model in a folder cannot be served. It is called with the
            configurations alone before weights are downloaded, and before the model is added to the store.
        report_progress: called with one line per stage, for example "Downloading ...".

    Raises:
        ModelError: the model is unknown, damaged or not supported.
    """
    how = _Import(
        check_pipeline=partial(require_pipeline, model or EMBEDDED_NAME, pipelines),
        check_files=check_files or _ignore,
        report_progress=report_progress or _ignore,
        revision=revision,
        prefer_fp16=prefer_fp16,
        single_file_config=single_file_config,
        options=options or ModelOptions(),
    )
    return _resolve(model, how)


def import_model(
    source: str | None,
    *,
    revision: str | None = None,
    prefer_fp16: bool = False,
    single_file_config: str | None = None,
    pipelines: Collection[str] | None = None,
    check_files: Check | None = None,
    report_progress: ReportProgress | None = None,
) -> StoredModel:
    """Import the source's current state, which may also be a refiner; an unchanged source is not imported
    again.
    """

    def check(pipeline_file: Path) -> None:
        name = source or EMBEDDED_NAME
        if pipeline_class_of(pipeline_file.parent, name) != REFINER_PIPELINE:
            require_pipeline(name, pipelines, pipeline_file)

    how = _Import(
        check_pipeline=check,
        check_files=check_files or _ignore,
        report_progress=report_progress or _ignore,
        revision=revision,
        prefer_fp16=prefer_fp16,
        single_file_config=single_file_config,
        check_for_update=True,
    )
    return _resolve(source, how)


def get_or_import_refiner(
    refiner: str | None,
    *,
    prefer_fp16: bool = False,
    check_files: Check | None = None,
    report_progress: ReportProgress | None = None,
) -> StoredModel | None:
    """`get_or_import` for the refiner in the settings; None without one.

    Raises:
        ModelError: also if it is not a refiner; for a hub model, before its weights are downloaded.
    """

    if refiner is None:
        return None
    how = _Import(
        check_pipeline=partial(require_refiner, refiner),
        check_files=check_files or _ignore,
        report_progress=report_progress or _ignore,
        prefer_fp16=prefer_fp16,
    )
    return _resolve(refiner, how)


def require_refiner(refiner: str, pipeline_file: Path) -> None:
    found = pipeline_class_of(pipeline_file.parent, refiner)
    if found != REFINER_PIPELINE:
        raise ModelError(f"{refiner} is not a refiner: it must be a {REFINER_PIPELINE}, and is a {found}.")


def _resolve(given: str | None, how: _Import) -> StoredModel:
    match kind_of(given, how.single_file_config):
        case _ if given is None or given == EMBEDDED_NAME:
            stored = _import_folder(EMBEDDED_FOLDER, EMBEDDED_NAME, replace(how, check_files=_ignore))
        case "folder":
            stored = _import_folder(Path(os.path.expanduser(given)), given, how)
        case "file":
            stored = _import_single_file(given, how)
        case "tag":
            stored = find_by_tag(given)
        case "hub":
            stored = None if how.check_for_update else _find_hub_model(given, how)
            stored = stored or _import_hub_model(given, how)
    check_folder(stored.path)
    how.check_pipeline(stored.path / PIPELINE_FILE)
    return stored


def _import_folder(folder: Path, source: str, how: _Import) -> StoredModel:
    check_folder(folder)
    how.check_pipeline(folder / PIPELINE_FILE)
    folder = folder.resolve()
    selection = select_in_folder(folder, prefer_fp16=how.prefer_fp16)
    is_embedded = source == EMBEDDED_NAME
    version = digest(folder, selection, of_contents=is_embedded)
    name = EMBEDDED_NAME if is_embedded else _store_name(folder.name)
    return replace(_import(f"{name}:{version}", source, folder, selection, {}, how), source=source)


def _import_single_file(given: str, how: _Import) -> StoredModel:
    folder, selection = single_file.select(
        given,
        how.single_file_config,
        how.options,
        local_folder,
        prefer_fp16=how.prefer_fp16,
        check_pipeline=how.check_pipeline,
        check_files=how.check_files,
        report_progress=how.report_progress,
    )
    file = Path(selection.files[CHECKPOINT])
    tag = f"{_store_name(file.stem)}:{digest(folder, selection, of_contents=False)}"
    stored = _import(tag, given, folder, selection, {"origin": str(file)}, how)
    return replace(stored, source=given)


def _import_hub_model(repo: str, how: _Import) -> StoredModel:
    how.report_progress(f"Looking up {repo} on the hub")
    model = resolve_hub_model(
        repo, revision=how.revision, prefer_fp16=how.prefer_fp16, check=how.check_pipeline
    )
    version = model.commit[:12] + ("-fp16" if model.selection.fp16 == "taken" else "")
    tag = f"{_store_name(repo)}:{version}"
    with suppress(ModelError):
        return open_entry(tag)
    configurations = model.selection.without_weights()
    with linked(download(replace(model, selection=configurations)), configurations) as folder:
        write_headers(model, model.selection, folder)
        how.check_files(folder)
    how.report_progress(
        f"Downloading {repo}: {len(model.selection.files)} files, {model.size_bytes / 1e9:.1f} GB"
    )
    # The keys and values are stored in existing entries, so they must not change.
    metadata = {
        "revision": model.commit,
        "asked_revision": how.revision or "",
        "fp16": model.selection.fp16,
    }
    return _import(tag, repo, download(model), model.selection, metadata, how)


def _find_hub_model(repo: str, how: _Import) -> StoredModel | None:
    import bentoml

    fp32 = None
    for stored in list_models():
        metadata = bentoml.models.get(stored.tag).info.metadata
        if stored.source != repo or "revision" not in metadata:
            continue
        revisions = [metadata["asked_revision"]] + ([metadata["revision"]] if how.revision else [])
        if (how.revision or "") not in revisions:
            continue
        if metadata["fp16"] == "none" or (metadata["fp16"] == "taken") == how.prefer_fp16:
            return stored
        if how.prefer_fp16:  # converted when it is loaded, which takes less time than another download
            fp32 = fp32 or stored
    return fp32


def _import(
    tag: str, source: str, folder: Path, selection: Selection, metadata: dict[str, Any], how: _Import
) -> StoredModel:
    """Write the entry unless it exists; only one of several processes does so."""
    with suppress(ModelError):
        return open_entry(tag)
    name = tag.partition(":")[0]
    try:
        with import_lock(name, how.report_progress):
            with suppress(ModelError):
                return open_entry(tag)

            def check(staged: Path) -> None:
                how.check_files(staged)
                how.report_progress(f"Importing {source} as {tag}")

            metadata = {"source": source, "origin": str(folder), **metadata}
            write_entry(tag, folder, selection, metadata, check)
    except OSError as error:
        raise ModelError(f"{source} cannot be imported: {error}") from error
    return open_entry(tag)


def _store_name(given: str) -> str:
    """A name that BentoML allows: [a-z0-9._-], at most 63 letters. The embedded model's name is reserved."""
    name = re.sub(r"[^a-z0-9._-]+", "-", given.lower().replace("/", "--")).strip("._-") or "model"
    if len(name) > 63:
        name = f"{name[:54]}-{hashlib.sha256(given.encode()).hexdigest()[:8]}"
    return f"{name}-folder" if name == EMBEDDED_NAME else name
