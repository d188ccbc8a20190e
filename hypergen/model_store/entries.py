"""Entries of BentoML's model store: written atomically, and checked each time they are opened.

An entry is written to a staging folder and renamed into the store, so that a killed import leaves no
incomplete entry. Its metadata lists its files with sizes and times, so that later damage is noticed.
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
    link_or_copy,
)

MAX_COPY_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class StoredModel:
    """A model of the store.

    Args:
        tag: "name:version"; the version is a digest of the content or the hub's commit.
        source: the hub id or folder that was imported, or "hypergen-tiny" for the embedded model.
        path: the entry's folder, in diffusers layout.
    """

    tag: str
    source: str
    path: Path
    size_bytes: int
    created: datetime


def open_entry(tag: str) -> StoredModel:
    """Open the entry with exactly this tag and check that its files are unchanged.

    Raises:
        ModelError: there is no such entry, or a file is missing or changed.
    """
    import bentoml
    from bentoml.exceptions import BentoMLException

    try:
        model = bentoml.models.get(tag)
    except (BentoMLException, ValueError):
        raise ModelError(f"No model '{tag}' in the store.") from None
    path = Path(model.path)
    metadata: dict[str, Any] = model.info.metadata
    # BentoML also accepts the beginning of a version.
    if str(model.tag) != tag or not (path / PIPELINE_FILE).is_file():
        raise ModelError(f"No model '{tag}' in the store.")
    files: dict[str, list[int]] = metadata.get("files", {})
    for name, (size, mtime_ns) in files.items():
        if not is_unchanged(path / name, size, mtime_ns):
            origin = metadata["origin"]
            raise ModelError(
                f"{tag}: {name} is missing or has changed since the import; import {origin} again."
            )
    size_bytes = sum(size for size, _ in files.values()) if files else model.file_size
    return StoredModel(tag, str(metadata.get("source", tag)), path, size_bytes, model.creation_time)


def write_entry(
    tag: str,
    folder: Path,
    selection: Selection,
    metadata: dict[str, Any],
    check_files: Callable[[Path], None] | None = None,
) -> None:
    """Write the entry into a staging store and move it into the store.

    `bentoml.models.create` copies the files of its folder when it exits, so links would not survive. It
    therefore writes only `model.yaml`; the files are added in the staging store.

    Args:
        check_files: raises a ModelError if the model in a folder cannot be served.
    """
    import bentoml
    from bentoml._internal.models import ModelStore
    from bentoml.exceptions import BentoMLException

    name, _, version = tag.partition(":")
    stats = {stored: (folder / file).stat() for stored, file in selection.files.items()}
    metadata["files"] = {stored: [stat.st_size, stat.st_mtime_ns] for stored, stat in stats.items()}
    small = sum(stat.st_size for stat in stats.values()) < MAX_COPY_BYTES
    store, staging = store_folder(), state_folder() / name
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with bentoml.models.create(
            tag, labels={"made-by": "hypergen"}, metadata=metadata, _model_store=ModelStore(staging)
        ):
            pass
        for stored, file in selection.files.items():
            target = staging / name / version / stored
            target.parent.mkdir(exist_ok=True)
            link_or_copy(folder / file, target, copy_weights=small)
        _check_staged(staging / name / version, metadata["source"], check_files)
        shutil.rmtree(store / name / version, ignore_errors=True)  # a damaged entry with this tag
        (store / name).mkdir(parents=True, exist_ok=True)
        (store / name / "latest").unlink(missing_ok=True)
        shutil.move(staging / name / version, store / name / version)
        with suppress(BentoMLException):
            bentoml.models.get(name)  # writes `latest` again
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_staged(folder: Path, source: str, check_files: Callable[[Path], None] | None) -> None:
    try:
        check_folder(folder)
        if check_files is not None:
            check_files(folder)
    except ModelError as error:
        raise ModelError(str(error).replace(str(folder), source)) from None


@contextmanager
def import_lock(name: str, report_progress: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock for imports of this model; waits for another process that holds it."""
    from filelock import FileLock, Timeout

    lock = FileLock(state_folder() / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report_progress(f"Waiting for another process that is importing {name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def store_folder() -> Path:
    from bentoml._internal.configuration.containers import BentoMLContainer

    return Path(BentoMLContainer.model_store.get()._path)


def state_folder() -> Path:
    """Locks, staging, and what engines keep between starts; on the store's file system, so that links and
    renames work.
    """
    from bentoml._internal.configuration.containers import BentoMLContainer

    folder = Path(BentoMLContainer.bentoml_home.get()) / "hypergen"
    folder.mkdir(exist_ok=True)
    return folder
