"""Loading a checkpoint in one file: its weights through diffusers' `from_single_file`, the rest from the
folder that the model store made for it.
"""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hypergen.errors import ModelError
from hypergen.model_store.diffusers_layout import (
    CHECKPOINT,
    OPTIONAL_IN_CHECKPOINTS,
    PIPELINE_FILE,
    components_in_checkpoint,
    read_components,
)

logger = logging.getLogger(__name__)

_ITS_TOKENIZER = "tokenizer_3"
_INCOMPLETE = "The checkpoint lacks weights that its configuration names; is it that of another model?"


def load_checkpoint(pipeline_class: Any, path: Path, dtype: torch.dtype, left_out: dict[str, None]) -> Any:
    """A pipeline of diffusers, on the CPU.

    Args:
        path: the folder, in diffusers' layout but for the weights that are in its `checkpoint.safetensors`.
        left_out: components that are not loaded.

    Raises:
        ModelError: file and configuration do not fit together.
    """
    index = json.loads((path / PIPELINE_FILE).read_text(encoding="utf-8"))
    inside = components_in_checkpoint(path)
    given: dict[str, Any] = dict(left_out)
    for name in read_components(path / PIPELINE_FILE, str(path)):
        if name not in given and any((path / name).glob("*.safetensors")):
            library, class_name = index[name]
            kind = getattr(importlib.import_module(library), class_name)
            given[name] = kind.from_pretrained(path / name, dtype=dtype, local_files_only=True)
    if OPTIONAL_IN_CHECKPOINTS in index and OPTIONAL_IN_CHECKPOINTS not in {*given, *inside}:
        logger.info("The checkpoint has no T5, and its folder neither: prompts are read by CLIP alone.")
        given |= {OPTIONAL_IN_CHECKPOINTS: None, _ITS_TOKENIZER: None}
    try:
        pipeline: Any = pipeline_class.from_single_file(
            str(path / CHECKPOINT), config=str(path), dtype=dtype, local_files_only=True, **given
        )
    except NotImplementedError:  # weights that the file had none for were to be moved
        raise ModelError(_INCOMPLETE) from None
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    if any(parameter.is_meta for network in networks for parameter in network.parameters()):
        raise ModelError(_INCOMPLETE)
    pipeline.register_to_config(_name_or_path=str(path))  # where its LoRAs lie, as `from_pretrained` has it
    return pipeline
