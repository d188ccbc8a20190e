"""Files with weights from anywhere: reading them, and what their metadata say of the base model."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch

from hypergen.lora.factors import IncompatibleLoraError, Parts
from hypergen.model_families import PIPELINES
from hypergen.model_store.lora_layout import base_model


def read_safetensors(path: Path, max_bytes: float) -> tuple[Parts, Mapping[str, str]]:
    """The tensors, sorted by name, and the metadata of a file.

    Raises:
        IncompatibleLoraError: it cannot be read, or is too large.
        Exception: it is damaged.
    """
    data = read_file(path, max_bytes)
    tensors = dict(sorted(safetensors.torch.load(data).items()))
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    return tensors, metadata


def read_file(path: Path, max_bytes: float) -> bytes:
    """Read a file after checks on the same descriptor, so that it cannot be exchanged in between.

    Raises:
        IncompatibleLoraError: it cannot be read, or is too large.
    """
    try:
        descriptor = os.open(path.resolve(strict=True), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, RuntimeError):
        raise IncompatibleLoraError("cannot be read") from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise IncompatibleLoraError("cannot be read")
        if status.st_size > max_bytes:
            raise IncompatibleLoraError(f"is larger than {max_bytes / 1e6:.0f} MB")
        return file.read()


def families_of(pipeline: Any) -> frozenset[str]:
    """`families_by_width` of a pipeline."""
    unet = getattr(pipeline, "unet", None)
    return families_by_width(type(pipeline).__name__, unet and unet.config.cross_attention_dim)


def families_by_width(pipeline_class: str, text_width: int | None) -> frozenset[str]:
    """The names of a model in LoRA files; several if its size is none of a published model.

    Args:
        text_width: of the prompt embeddings, of UNets.
    """
    spec = PIPELINES.get(pipeline_class)
    if spec is None:
        return frozenset()
    widths = spec.lora_text_widths
    if not widths:
        return frozenset({spec.name})
    known = None if text_width is None else widths.get(text_width)
    return frozenset(widths.values() if known is None else {known})


def check_base_model(metadata: Mapping[str, str], families: frozenset[str]) -> None:
    """
    Args:
        families: names of the served model in `BaseModel.family`; empty: not checked.

    Raises:
        IncompatibleLoraError: the file is for another model.
    """
    base = base_model(metadata)
    if base is not None and families and base.family not in families:
        raise IncompatibleLoraError(
            f"is for another model: its {base.key} is '{base.value[:100]}', "
            f"this is {' or '.join(sorted(families))}"
        )
