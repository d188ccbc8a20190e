"""Temporary folders of a server, and the removal of those that killed servers left."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: folders of killed servers are not removed
    fcntl = None

IMAGES, METRICS = "hypergen-images-", "hypergen-metrics-"


def make_folder(prefix: str) -> Path:
    """A new private folder, which stays only while a process has its lock; `prefix` is one of those above."""
    return Path(tempfile.mkdtemp(prefix=prefix))


def create_and_lock(folder: Path) -> int:
    """Create a folder unless it exists, and lock it: its server runs.

    Returns a descriptor with the lock, which the system releases when the process ends.

    Another server that starts meanwhile may remove the folder before it is locked: hence the loop.
    """
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY)
            locked = _lock(descriptor) or fcntl is None
            if locked and folder.is_dir():
                return descriptor
            os.close(descriptor)


def remove_folders_of_killed_servers() -> None:
    """Remove the folders of servers that were killed before they could remove them."""
    temporary = Path(tempfile.gettempdir())
    for folder in [*temporary.glob(IMAGES + "*"), *temporary.glob(METRICS + "*")]:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        except OSError:  # another user's, or removed meanwhile
            continue
        try:
            if _lock(descriptor):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Take the lock; False if another process has it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
