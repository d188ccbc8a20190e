"""The API keys of a server: from settings and from a key file, which is read again when it changes.

A line of the file is a key, or a name and a key, with limits:

    # the two applications
    shop: sk-3f9a requests=4 images_per_minute=60 priority=high
    sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from hypergen.config import ServerSettings
from hypergen.errors import ConfigurationError, SettingError
from hypergen.request import ApiKey, Priority

logger = logging.getLogger(__name__)

# A variable with a random key by which `hypergen serve` reads all of its service's /health.
LAUNCHER_KEY = "_HYPERGEN_LAUNCHER_KEY"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}:")
_HASH = re.compile(r"sha256:([0-9a-fA-F]{64})")
_COMMENT = re.compile(r"(^|\s)#.*")


class _Limits(BaseModel, extra="forbid"):
    """The words after a key in the file."""

    requests: int | None = Field(None, ge=1)
    images_per_minute: int | None = Field(None, ge=1)
    priority: Priority = "normal"


class ApiKeys:
    """The valid keys as SHA-256 digests, each with its name and limits.

    Raises:
        ConfigurationError: the key file cannot be read, has no key, or a line is invalid.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._file = settings.api_key_file
        self._own = {_digest(settings.api_key.encode()): ApiKey("api-key")} if settings.api_key else {}
        if (self._own or self._file) and (launcher := os.environ.get(LAUNCHER_KEY)):
            self._own[_digest(launcher.encode())] = ApiKey("hypergen-serve")
        self._version = self._file_version()
        self._by_digest = self._own | (_read(self._file) if self._file else {})

    def __bool__(self) -> bool:
        return bool(self._by_digest)

    def find(self, key: bytes) -> ApiKey | None:
        """The valid key with this secret; the file is read again if it has changed."""
        if self._file is not None and self._file_version() != self._version:
            self.reload()
        # A dictionary reveals at most the first bits of a digest by its time, and a digest reveals no key.
        return self._by_digest.get(_digest(key))

    def reload(self) -> None:
        """Read the key file again. If it is invalid, the keys stay as they are and the log says why."""
        if self._file is None:
            return
        self._version = self._file_version()
        try:
            self._by_digest = self._own | _read(self._file)
        except ConfigurationError as error:
            logger.error("%s The keys stay as they were.", error)
        else:
            logger.info("Read %d keys from %s.", len(self._by_digest), self._file)

    def _file_version(self) -> tuple[int, ...]:
        try:
            status = os.stat(self._file) if self._file else None
        except OSError:
            return ()
        return () if status is None else (status.st_ino, status.st_size, status.st_mtime_ns)


def _read(file: Path) -> dict[bytes, ApiKey]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError("api_key_file", f"{file} cannot be read: {error}.") from None
    keys: dict[bytes, ApiKey] = {}
    for number, digest, key in _parse(file, lines):
        if digest in keys:
            raise _invalid(file, number, "has the same key as an earlier line")
        if any(other != key for other in keys.values() if other.name == key.name):
            raise _invalid(file, number, f"gives '{key.name}' other limits than an earlier line")
        keys[digest] = key
    if not keys:
        raise SettingError("api_key_file", f"{file} has no key.")
    return keys


def _parse(file: Path, lines: list[str]) -> Iterator[tuple[int, bytes, ApiKey]]:
    for number, line in enumerate(lines, 1):
        text = _COMMENT.sub("", line).strip()
        if not text:
            continue
        words = text.split()
        name = words.pop(0)[:-1] if len(words) > 1 and _NAME.fullmatch(words[0]) else None
        secret, *limits = words
        is_limit = secret.partition("=")[0] in _Limits.model_fields  # the key was forgotten
        if is_limit or not all("=" in word for word in limits):
            raise _invalid(file, number, "must be KEY or NAME: KEY, and then limits such as requests=4")
        try:
            given = _Limits.model_validate(dict(word.split("=", 1) for word in limits))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise _invalid(file, number, f"{first['loc'][0]}: {first['msg']}") from None
        hashed = _HASH.fullmatch(secret)
        digest = bytes.fromhex(hashed[1]) if hashed else _digest(secret.encode())
        # The start of a digest names a key that has no name, also after lines have moved.
        name = name or f"key-{digest.hex()[:8]}"
        yield number, digest, ApiKey(name, given.priority, given.requests, given.images_per_minute)


def _invalid(file: Path, number: int, reason: str) -> ConfigurationError:
    return ConfigurationError(f"{file}, line {number}: {reason}.")  # without the line: it has the key


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
