"""What a model is given by, a folder, checkpoint file, store tag or hub id, checked without importing it."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Literal

from hypergen.errors import ModelError, SettingError
from hypergen.model_store import single_file
from hypergen.model_store.checkpoint_detection import read_checkpoint
from hypergen.model_store.diffusers_layout import (
    CHECKPOINT,
    PIPELINE_FILE,
    check_folder,
    require_pipeline,
    safetensors_header,
)
from hypergen.model_store.entries import find_by_tag, list_models, unknown_model
from hypergen.model_store.hub import HUB_ID

EMBEDDED_NAME = "hypergen-tiny"
EMBEDDED_FOLDER = Path(__file__).resolve().parents[1] / "embedded"


def local_folder(model: str | None) -> Path | None:
    """The folder of a model that is on this machine; None if it must be downloaded."""
    if model is None or model == EMBEDDED_NAME:
        return EMBEDDED_FOLDER
    if os.path.isdir(path := os.path.expanduser(model)):
        return Path(path)
    with suppress(ModelError):
        return find_by_tag(model).path
    return next((stored.path for stored in list_models() if stored.source == model), None)


def check_source(
    model: str | None, *, single_file_config: str | None = None, pipelines: Collection[str] | None = None
) -> Path | None:
    """Check a model as far as that needs no download, and import nothing; see `get_or_import`.

    Returns:
        The folder of a model; None: it is a single-file checkpoint, or not on this machine.

    Raises:
        ModelError: the model is unknown, damaged or not supported.
    """
    if kind_of(model, single_file_config) == "file":
        file = Path(os.path.expanduser(str(model))).absolute()
        if file.suffix != single_file.SUFFIX:
            raise ModelError(single_file.other_suffix(str(model)))
        read_checkpoint(safetensors_header(file, str(file.parent), file.name), str(model))
        return None
    folder = local_folder(model)
    if folder is not None:
        check_folder(folder)
        require_pipeline(model or EMBEDDED_NAME, pipelines, folder / PIPELINE_FILE)
    return folder


def kind_of(given: str | None, single_file_config: str | None) -> Literal["folder", "file", "tag", "hub"]:
    """What a model is given by.

    Raises:
        ModelError: there is no such model.
        SettingError: it is no checkpoint that could have a configuration.
    """
    path = os.path.expanduser(given or "")  # Path.expanduser raises for unknown users
    is_checkpoint = given is not None and given.endswith(single_file.SUFFIX)
    is_tag = given is not None and "/" not in given and not os.path.exists(path)
    if single_file_config is not None and not (is_checkpoint or is_tag):
        raise _only_checkpoints(given)
    if given is None or given == EMBEDDED_NAME or os.path.isdir(path):
        return "folder"
    if os.path.isfile(path):
        return "file"
    if is_checkpoint:
        raise ModelError(f"No such file: {given}")
    if given.startswith(("/", ".", "~")):
        raise ModelError(f"No such folder: {given}")
    if is_tag:
        stored = find_by_tag(given)
        if single_file_config is not None and not (stored.path / CHECKPOINT).is_file():
            raise _only_checkpoints(given)
        return "tag"
    if HUB_ID.fullmatch(given):
        return "hub"
    raise ModelError(unknown_model(given))


def _only_checkpoints(given: str | None) -> SettingError:
    return SettingError("single_file_config", f"is only for single-file checkpoints; {given} is not one.")
