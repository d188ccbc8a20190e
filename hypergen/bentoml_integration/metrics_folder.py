"""A folder of its own for the metrics of each server.

BentoML keeps the metrics of all servers of a user in one folder, which each start empties.
"""

from __future__ import annotations

import atexit
import shutil
from functools import cache

from bentoml._internal.configuration.containers import BentoMLContainer

from hypergen.images.temporary_folders import METRICS, create_and_lock, make_folder


def use_own_folder() -> None:
    """Let BentoML start a server with a new folder. Its workers get the folder from their environment."""
    BentoMLContainer.prometheus_multiproc_dir._provide = _own_folder


@cache
def _own_folder() -> str:
    """A folder that this process, which starts the workers, locks until its end and then removes."""
    folder = make_folder(METRICS)
    create_and_lock(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(folder)
