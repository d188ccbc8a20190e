"""Entries of BentoML's model store: written atomically, and checked each time they are opened.

An entry is written to a staging folder and renamed into the store, so that a killed import leaves no
incomplete entry. Its metadata lists its files with sizes and times, so that later damage is noticed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hypergen.errors import ConfigurationError, ModelError
from hypergen.model_store.diffusers_layout import PIPELINE_FILE, Selection, check_folder

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

    store_folder()  # reports a store that cannot be used
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
        if not _is_unchanged(path / name, size, mtime_ns):
            origin = metadata["origin"]
            raise ModelError(
                f"{tag}: {name} is missing or has changed since the import; import {origin} again."
            )
    size_bytes = sum(size for size, _ in files.values()) if files else model.file_size
    return StoredModel(tag, str(metadata.get("source", tag)), path, size_bytes, model.creation_time)


def find_by_tag(tag: str) -> StoredModel:
    """Look up "name:version", "name:latest" or "name"; the latest is the newest undamaged entry."""
    name, _, version = tag.lower().partition(":")
    if version not in ("", "latest") and (store_folder() / name / version).is_dir():
        return open_entry(f"{name}:{version}")
    versions = [stored for stored in list_models() if stored.tag.startswith(f"{name}:")]
    if version not in ("", "latest") or not versions:
        raise ModelError(unknown_model(tag))
    return versions[0]


def list_models() -> list[StoredModel]:
    """Every undamaged model of the store in diffusers layout, newest first."""
    found: list[StoredModel] = []
    for folder in store_folder().glob("*/*/"):
        with suppress(ModelError):
            found.append(open_entry(f"{folder.parent.name}:{folder.name}"))
    return sorted(found, key=lambda stored: stored.created, reverse=True)


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
            _link_or_copy(folder / file, target, copy_weights=small)
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


def _link_or_copy(original: Path, target: Path, *, copy_weights: bool) -> None:
    """Hard-link weights; if that fails, copy them or, without `copy_weights`, add a symbolic link.

    Other files are copied, because people edit configurations in place. The original may itself be a symbolic
    link, as in the hub's cache.
    """
    original = original.resolve()
    if target.suffix == ".safetensors":
        with suppress(OSError):  # another file system, or no support for hard links
            os.link(original, target)
            return
        if not copy_weights:
            target.symlink_to(original)
            return
    shutil.copyfile(original, target)


def _is_unchanged(file: Path, size: int, mtime_ns: int) -> bool:
    """Whether a stored file still has the size and, if it is a link, the modification time of the import."""
    try:
        stat = file.stat()
    except OSError:
        return False
    # A linked file can be changed in its original folder. A copy of the store may have other times.
    is_linked = file.is_symlink() or stat.st_nlink > 1
    return stat.st_size == size and (not is_linked or stat.st_mtime_ns == mtime_ns)


def remove_entry(tag: str) -> None:
    """Remove the entry with this tag, also a damaged one. Files that its links point to stay.

    Raises:
        ModelError: there is no such entry.
    """
    import bentoml
    from bentoml.exceptions import BentoMLException

    name, _, version = tag.partition(":")
    if not (name and version and (store_folder() / name / version).is_dir()):
        raise ModelError(f"No model '{tag}' in the store; {_tags_in_store()}.")
    try:
        bentoml.models.delete(tag)
    except BentoMLException as error:
        raise ModelError(f"{tag} cannot be removed: {error}") from None


@contextmanager
def import_lock(name: str, report_progress: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock for imports of this model, a file that does not stay. Waits for other processes."""
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
        # While it is held: who waits for it finds that it is gone, and makes a new one.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def store_folder() -> Path:
    """
    Raises:
        ConfigurationError: there can be no store in BENTOML_HOME.
    """
    from bentoml._internal.configuration.containers import BentoMLContainer

    try:
        return Path(BentoMLContainer.model_store.get()._path)
    except OSError as error:
        home = os.environ.get("BENTOML_HOME", "~/bentoml")
        raise ConfigurationError(
            f"BENTOML_HOME, {home}, cannot hold the model store: {os.strerror(error.errno or 0)}."
        ) from None


def state_folder() -> Path:
    """Locks, staging, and what engines keep between starts; on the store's file system, so that links and
    renames work.
    """
    from bentoml._internal.configuration.containers import BentoMLContainer

    folder = Path(BentoMLContainer.bentoml_home.get()) / "hypergen"
    folder.mkdir(exist_ok=True)
    return folder


def unknown_model(given: str) -> str:
    """The message for a model that is neither a source nor in the store."""
    return (
        f"Unknown model '{given}': it must be a hub id (owner/name), a folder, or a tag of the model store "
        f"(name:version; {_tags_in_store()})."
    )


def _tags_in_store() -> str:
    tags = [stored.tag for stored in list_models()]
    return f"it has {', '.join(tags[:5])}{' ...' if len(tags) > 5 else ''}" if tags else "it is empty"
