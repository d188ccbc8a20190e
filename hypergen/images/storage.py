"""Storage: the files behind `url` results, kept for a while under names that nobody can guess."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hypergen.errors import StorageFullError

try:
    import fcntl
except ImportError:  # Windows: folders of killed servers stay there
    fcntl = None

_PREFIX = "hypergen-images-"


@dataclass(frozen=True)
class StoredImage:
    path: Path
    media_type: str
    size: int
    expires_at: float  # monotonic seconds


class ImageStorage:
    """A private folder with an index in memory. All methods may be called from any thread.

    Args:
        lifetime_s: how long a file can be fetched.
        max_bytes: how much the folder holds; the oldest files go first.
    """

    def __init__(self, lifetime_s: float, max_bytes: int) -> None:
        self._lifetime_s = lifetime_s
        self._max_bytes = max_bytes
        self._bytes = 0
        self._images: OrderedDict[str, StoredImage] = OrderedDict()
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self._descriptor: int | None = None  # of the folder, with a lock on it

    def put(self, data: bytes, extension: str, media_type: str) -> str:
        """Keep a file; returns its name, with 192 random bits.

        Raises:
            StorageFullError: the disk has no room or cannot be written.
        """
        name = f"{secrets.token_urlsafe(24)}.{extension}"
        path: Path | None = None
        try:
            path = self._make_folder() / name
            path.write_bytes(data)
        except OSError:
            if path is not None:
                _remove(path)
            raise StorageFullError(
                "The picture cannot be stored for its url; ask for response_format 'b64_json'.",
                param="response_format",
            ) from None
        with self._lock:
            self._images[name] = StoredImage(path, media_type, len(data), time.monotonic() + self._lifetime_s)
            self._bytes += len(data)
            self._drop_old()
        return name

    def get(self, name: str) -> StoredImage | None:
        """A stored file by its name; the name is looked up, never joined to a path."""
        with self._lock:
            self._drop_old()
            stored = self._images.get(name)
        return stored if stored is not None and stored.path.is_file() else None

    def read(self, name: str) -> bytes | None:
        """The bytes of a stored file; None also when its time ends in this moment."""
        stored = self.get(name)
        try:
            return None if stored is None else stored.path.read_bytes()
        except FileNotFoundError:
            return None

    def drop_old(self) -> None:
        """Remove files whose time is over; to be called every now and then."""
        with self._lock:
            self._drop_old()

    def close(self) -> None:
        """Remove every file."""
        with self._lock:
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._unlock()
            self._folder = None
            self._images.clear()
            self._bytes = 0

    def _make_folder(self) -> Path:
        """The folder, made on first use, because building or importing the service must leave no trace; and
        made again when whoever tidies up temporary files took it away. A lock on it says that its server
        runs.
        """
        with self._lock:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
            while self._descriptor is None or not self._folder.is_dir():
                self._unlock()
                self._folder.mkdir(mode=0o700, exist_ok=True)
                # Between these two lines another server that starts may take it for a killed one's.
                self._descriptor = os.open(self._folder, os.O_RDONLY)
                _lock(self._descriptor)
            return self._folder

    def _unlock(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _drop_old(self) -> None:
        now = time.monotonic()
        while self._images:
            name, oldest = next(iter(self._images.items()))
            alone = len(self._images) == 1
            if oldest.expires_at > now and (self._bytes <= self._max_bytes or alone):
                return
            del self._images[name]
            self._bytes -= oldest.size
            _remove(oldest.path)


def _remove(path: Path) -> None:
    """What cannot be removed must not fail the request that happens to come by."""
    with suppress(OSError):
        path.unlink()


def remove_folders_of_killed_servers() -> None:
    """Remove what servers left behind that were killed and could not close their storage."""
    for folder in Path(tempfile.gettempdir()).glob(_PREFIX + "*"):
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        except OSError:  # another user's, or gone
            continue
        try:
            if _lock(descriptor):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Take a lock that lasts as long as the process, however it ends; False if another process has it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
