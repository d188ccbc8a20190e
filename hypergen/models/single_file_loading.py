"""Load a single-file checkpoint with diffusers' `from_single_file`.

Configurations, and weights that the file does not have, come from the folder that the model store made.
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
from hypergen.model_families import optional_encoders
from hypergen.model_store.diffusers_layout import (
    CHECKPOINT,
    PIPELINE_FILE,
    components_in_checkpoint,
    read_components,
)

logger = logging.getLogger(__name__)

_INCOMPLETE = (
    "The checkpoint lacks weights that its configuration needs; is the configuration of another model?"
)


def load_checkpoint(pipeline_class: Any, path: Path, dtype: torch.dtype, left_out: dict[str, None]) -> Any:
    """A pipeline of diffusers, on the CPU.

    Args:
        path: a folder in diffusers' layout; its `checkpoint.safetensors` has the weights.
        left_out: components to skip.

    Raises:
        ModelError: file and configuration do not match.
    """
    index = json.loads((path / PIPELINE_FILE).read_text(encoding="utf-8"))
    in_checkpoint = components_in_checkpoint(path)
    components: dict[str, Any] = dict(left_out)
    for name in read_components(path / PIPELINE_FILE, str(path)):
        if name not in components and any((path / name).glob("*.safetensors")):
            library, class_name = index[name]
            component_class = getattr(importlib.import_module(library), class_name)
            components[name] = component_class.from_pretrained(
                path / name, dtype=dtype, local_files_only=True
            )
    for encoder, tokenizer in optional_encoders(index["_class_name"]).items():
        if encoder in index and encoder not in {*components, *in_checkpoint}:
            logger.info(
                "Neither the checkpoint nor its folder has %s: prompts are encoded without it.", encoder
            )
            components |= {encoder: None, tokenizer: None}
    try:
        pipeline: Any = pipeline_class.from_single_file(
            str(path / CHECKPOINT), config=str(path), dtype=dtype, local_files_only=True, **components
        )
    except NotImplementedError:  # diffusers moves weights that the file does not have
        raise ModelError(_INCOMPLETE) from None
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    if any(parameter.is_meta for network in networks for parameter in network.parameters()):
        raise ModelError(_INCOMPLETE)
    pipeline.register_to_config(_name_or_path=str(path))  # its LoRAs are there; `from_pretrained` sets it
    return pipeline
