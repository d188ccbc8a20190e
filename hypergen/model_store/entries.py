"""Entries of BentoML's model store: written whole or not at all, and looked over each time they are read.

An entry is built beside the store and renamed into it, so that a killed import leaves nothing that looks
whole. Its metadata lists its files with sizes and times, so that later damage is noticed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hypergen.errors import ModelError
from hypergen.model_store.diffusers_layout import (
    PIPELINE_FILE,
    Selection,
    check_folder,
    is_unchanged,
    place_file,
)

MAX_COPY_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class StoredModel:
    """A model of the store.

    Args:
        tag: "name:version"; the version is a digest of the content or the hub's commit.
        source: what was given: a hub id, a folder, or "hypergen-tiny" for the embedded model.
        path: the folder in diffusers layout to load from.
    """

    tag: str
    source: str
    path: Path
    size_bytes: int
    created: datetime


def read(tag: str) -> StoredModel:
    """Open the entry of exactly this tag and compare its files with what was imported."""
    import bentoml
    from bentoml.exceptions import BentoMLException

    try:
        model = bentoml.models.get(tag)
    except (BentoMLException, ValueError):
        raise ModelError(f"No model '{tag}' in the store.") from None
    path = Path(model.path)
    metadata: dict[str, Any] = model.info.metadata
    # BentoML takes the start of a version for the version.
    if str(model.tag) != tag or not (path / PIPELINE_FILE).is_file():
        raise ModelError(f"No model '{tag}' in the store.")
    files: dict[str, list[int]] = metadata.get("files", {})
    for name, (size, mtime_ns) in files.items():
        if not is_unchanged(path / name, size, mtime_ns):
            origin = metadata["origin"]
            raise ModelError(f"{tag}: {name} is gone or changed since its import; import {origin} again.")
    size_bytes = sum(size for size, _ in files.values()) if files else model.file_size
    return StoredModel(tag, str(metadata.get("source", tag)), path, size_bytes, model.creation_time)


def build(tag: str, folder: Path, selection: Selection, metadata: dict[str, Any]) -> None:
    """Write the entry into a staging store and move it over.

    `bentoml.models.create` copies what its folder holds into the store at exit, so links would not survive.
    So it writes the entry's description only, and the files join it in the staging store.
    """
    import bentoml
    from bentoml._internal.models import ModelStore
    from bentoml.exceptions import BentoMLException

    name, _, version = tag.partition(":")
    stats = {stored: (folder / file).stat() for stored, file in selection.files.items()}
    metadata["files"] = {stored: [stat.st_size, stat.st_mtime_ns] for stored, stat in stats.items()}
    small = sum(stat.st_size for stat in stats.values()) < MAX_COPY_BYTES
    store, staging = store_folder(), _work_folder() / name
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with bentoml.models.create(
            tag, labels={"made-by": "hypergen"}, metadata=metadata, _model_store=ModelStore(staging)
        ):
            pass
        for stored, file in selection.files.items():
            target = staging / name / version / stored
            target.parent.mkdir(exist_ok=True)
            place_file(folder / file, target, copy_weights=small)
        _check_staged(staging / name / version, metadata["source"])
        shutil.rmtree(store / name / version, ignore_errors=True)  # of this tag, found damaged above
        (store / name).mkdir(parents=True, exist_ok=True)
        (store / name / "latest").unlink(missing_ok=True)
        shutil.move(staging / name / version, store / name / version)
        with suppress(BentoMLException):
            bentoml.models.get(name)  # writes `latest` anew
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_staged(folder: Path, source: str) -> None:
    try:
        check_folder(folder)
    except ModelError as error:
        raise ModelError(str(error).replace(str(folder), source)) from None


@contextmanager
def lock(name: str, say: Callable[[str], None]) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(_work_folder() / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"Waiting for another process that is importing {name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def store_folder() -> Path:
    from bentoml._internal.configuration.containers import BentoMLContainer

    return Path(BentoMLContainer.model_store.get()._path)


def _work_folder() -> Path:
    """Locks and unfinished imports; on the store's file system, so that links and renames reach the store."""
    from bentoml._internal.configuration.containers import BentoMLContainer

    folder = Path(BentoMLContainer.bentoml_home.get()) / "hypergen"
    folder.mkdir(exist_ok=True)
    return folder
