"""The check of a model in this process, which has torch: a process of its own takes seconds to import it."""

from __future__ import annotations

from pathlib import Path

from hypergen.errors import ModelError
from hypergen.models.check_model import check_model
from hypergen.served_model_config import ModelOptions


def refuse_unusable(folder: Path, options: ModelOptions | None = None) -> None:
    """As `hypergen.model_store.model_check.refuse_unusable`."""
    if fault := check_model(folder, options or ModelOptions()).fault:
        raise ModelError(fault)
