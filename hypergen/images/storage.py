"""Storage of images: those of `url` results and of jobs, kept for a limited time under random names."""

from __future__ import annotations

from typing import Protocol

from hypergen import optional_packages
from hypergen.config import ServerSettings
from hypergen.images.folder_storage import FolderStorage, StoredImage


class ImageStorage(Protocol):
    """Where the server puts images that clients fetch later, for `url_lifetime_s`.

    Coroutines do not block the event loop; other methods may be called from any thread.
    """

    def check(self) -> None:
        """Check before the server starts that images can be stored. It may take seconds.

        Raises:
            SettingError: they cannot. The reason is one line.
        """
        ...

    def refuse_while_away(self) -> None:
        """Check before images are generated for it.

        Raises:
            UnavailableError: it could not be reached some seconds ago.
        """
        ...

    async def put(self, data: bytes, extension: str, media_type: str) -> str:
        """Store an image file; returns its name, with 192 random bits.

        Raises:
            StorageFullError: the disk is full or not writable.
            UnavailableError: the storage cannot be reached.
        """
        ...

    async def url(self, name: str, base: str) -> str:
        """The address of an image, which needs no key.

        Args:
            base: the URL before the names that the server itself serves; see `get`.

        Raises:
            UnavailableError: the storage cannot be reached.
        """
        ...

    async def read(self, name: str) -> bytes | None:
        """The bytes of an image; None if the name is unknown or the image has expired.

        Raises:
            UnavailableError: the storage cannot be reached.
        """
        ...

    def get(self, name: str) -> StoredImage | None:
        """The file that the server serves under this name; None if there is none."""
        ...

    def remove_expired(self) -> None:
        """Remove expired images; called periodically."""
        ...

    def close(self) -> None:
        """Remove what only this server knows."""
        ...


def open_storage(server: ServerSettings) -> ImageStorage:
    """The storage of the settings. It is neither created nor reached before its first use.

    Raises:
        SettingError: it needs a package that is not installed.
    """
    if server.storage is None:
        return FolderStorage(server.url_lifetime_s, int(server.url_storage_mb * 1e6))
    optional_packages.require("obstore", "storage", server.storage)
    from hypergen.images.s3_storage import S3Storage

    return S3Storage(server.storage, server.url_lifetime_s, server.storage_public_url)
