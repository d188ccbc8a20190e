"""A folder of its own for the metrics of each server.

BentoML keeps the metrics of all servers of a user in one folder, which each start empties.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from bentoml._internal.configuration.containers import BentoMLContainer

from hypergen.temporary_folders import METRICS, open_and_lock

# From the process that starts workers to its workers.
_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def use_own_folder() -> None:
    """Let BentoML start its server with a new folder, which it creates; no effect in its workers."""
    if _VARIABLE in os.environ:
        return
    folder = Path(tempfile.gettempdir()) / f"{METRICS}{secrets.token_hex(8)}"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    BentoMLContainer.prometheus_multiproc_dir.set(str(folder))


def lock_folder() -> None:
    """Mark the folder as used by a running server; in the worker."""
    if folder := os.environ.get(_VARIABLE):
        open_and_lock(Path(folder))
