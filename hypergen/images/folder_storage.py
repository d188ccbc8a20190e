"""The default storage of images: files in a temporary folder of the server, with random names."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hypergen.errors import StorageFullError
from hypergen.images.temporary_folders import IMAGES, create_and_lock, make_folder


@dataclass(frozen=True)
class StoredImage:
    path: Path
    media_type: str
    size: int  # bytes
    expires_at: float  # monotonic seconds


class FolderStorage:
    """A private folder with an index in memory. It is an `ImageStorage`; see there for the methods.

    Args:
        lifetime_s: seconds for which a file can be fetched.
        max_bytes: size of the folder; beyond it, the oldest files are removed.
    """

    def __init__(self, lifetime_s: float, max_bytes: int) -> None:
        self._lifetime_s = lifetime_s
        self._max_bytes = max_bytes
        self._bytes = 0
        self._images: OrderedDict[str, StoredImage] = OrderedDict()
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self._descriptor: int | None = None  # holds the lock on the folder

    def check(self) -> None:
        """The folder is created on first use."""

    def refuse_while_away(self) -> None:
        """A folder is always there."""

    async def put(self, data: bytes, extension: str, media_type: str) -> str:
        return await asyncio.to_thread(self._put, data, extension, media_type)

    def _put(self, data: bytes, extension: str, media_type: str) -> str:
        name = f"{secrets.token_urlsafe(24)}.{extension}"
        path: Path | None = None
        try:
            path = self._make_folder() / name
            path.write_bytes(data)
        except OSError:
            if path is not None:
                _remove(path)
            raise StorageFullError(
                "The image cannot be stored for a url result; use response_format 'b64_json'.",
                param="response_format",
            ) from None
        with self._lock:
            self._images[name] = StoredImage(path, media_type, len(data), time.monotonic() + self._lifetime_s)
            self._bytes += len(data)
            self._remove_expired()
        return name

    async def url(self, name: str, base: str) -> str:
        return base + name

    def get(self, name: str) -> StoredImage | None:
        # The name is only a key in the index, never part of a path.
        with self._lock:
            self._remove_expired()
            stored = self._images.get(name)
        return stored if stored is not None and stored.path.is_file() else None

    async def read(self, name: str) -> bytes | None:
        return await asyncio.to_thread(self._read, name)

    def _read(self, name: str) -> bytes | None:
        stored = self.get(name)
        try:
            return None if stored is None else stored.path.read_bytes()
        except FileNotFoundError:
            return None

    def remove_expired(self) -> None:
        with self._lock:
            self._remove_expired()

    def close(self) -> None:
        with self._lock:
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._unlock()
            self._folder = None
            self._images.clear()
            self._bytes = 0

    def _make_folder(self) -> Path:
        """The folder. It is created on first use, because building or importing the service must create no
        files, and again after a cleanup of temporary files. The lock on it marks its server as running.
        """
        with self._lock:
            if self._folder is None:
                self._folder = make_folder(IMAGES)
            if self._descriptor is None or not self._folder.is_dir():
                self._unlock()
                self._descriptor = create_and_lock(self._folder)
            return self._folder

    def _unlock(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _remove_expired(self) -> None:
        now = time.monotonic()
        while self._images:
            name, oldest = next(iter(self._images.items()))
            is_last = len(self._images) == 1
            if oldest.expires_at > now and (self._bytes <= self._max_bytes or is_last):
                return
            del self._images[name]
            self._bytes -= oldest.size
            _remove(oldest.path)


def _remove(path: Path) -> None:
    with suppress(OSError):  # the current request must not fail because of another one's file
        path.unlink()
