"""Row buckets, chosen once for a shape and kept in a file: a clock must not choose again after a restart."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from filelock import FileLock

logger = logging.getLogger(__name__)


class BucketStore:
    """Buckets by shape, for one model on one kind of device with certain versions of libraries.

    Args:
        file: shared by all engines of a machine; None keeps nothing.
        key: what the bits of a forward pass depend on beside the shape: model, dtype, device name, versions.
    """

    def __init__(self, file: Path | None, key: Mapping[str, str]) -> None:
        self._file = file
        self._key = json.dumps(dict(key), sort_keys=True)
        self._known = self._read().get(self._key, {})

    def get(self, shape: str) -> int | None:
        return self._known.get(shape)

    def put(self, shape: str, bucket: int, *, replace: bool = False) -> int:
        """Keep a bucket; returns that of another engine which was first, unless it is to be replaced."""
        if self._file is not None:
            try:
                with FileLock(self._file.with_suffix(".lock")):
                    everything = self._read()
                    buckets = everything.setdefault(self._key, {})
                    bucket = bucket if replace else buckets.get(shape, bucket)
                    buckets[shape] = bucket
                    temporary = self._file.with_suffix(f".{os.getpid()}")
                    temporary.write_text(json.dumps(everything, indent=1), encoding="utf-8")
                    temporary.replace(self._file)
            except OSError as error:
                logger.warning(
                    "Cannot keep the row bucket of a shape in %s (%s): after a restart the same seed may "
                    "give other bits.",
                    self._file,
                    error,
                )
        self._known[shape] = bucket
        return bucket

    def _read(self) -> dict[str, dict[str, int]]:
        if self._file is None:
            return {}
        try:
            content: Any = json.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            content = error
        if not isinstance(content, dict):
            logger.warning(
                "Cannot read the row buckets in %s (%s); they are chosen again.", self._file, content
            )
            return {}
        return cast(dict[str, dict[str, int]], content)
