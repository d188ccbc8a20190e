"""The checkpoint file in a model's folder: what it is, and what it states of the model."""

from __future__ import annotations

import json
from pathlib import Path

from hypergen.model_families import EDM_MARKERS
from hypergen.model_store.checkpoint_detection import Checkpoint, read_checkpoint
from hypergen.model_store.diffusers_layout import CHECKPOINT, safetensors_header
from hypergen.served_model_config import ModelOptions


def options_of(path: Path, given: ModelOptions) -> ModelOptions:
    """The options that a model's checkpoint file states, overridden by those of its served-model file."""
    if not (path / CHECKPOINT).is_file():
        return given
    return open_checkpoint(path).options.overridden_by(given)


def is_edm_checkpoint(path: Path) -> bool:
    """Whether the model in `path` has a checkpoint with EDM's markers."""
    return (path / CHECKPOINT).is_file() and set(EDM_MARKERS) <= json.loads(checkpoint_header(path)).keys()


def open_checkpoint(path: Path) -> Checkpoint:
    return read_checkpoint(checkpoint_header(path), CHECKPOINT)


def checkpoint_header(path: Path) -> bytes:
    return safetensors_header(path / CHECKPOINT, str(path), CHECKPOINT)
