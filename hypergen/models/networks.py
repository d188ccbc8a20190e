"""The networks of a model folder, made without values and then given their weights."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from hypergen.model_store.diffusers_layout import PIPELINE_FILE


def empty_network(folder: Path, component_class: Any, **changes: Any) -> nn.Module:
    """A network without values, of the configuration in a folder.

    Args:
        changes: of the configuration.
    """
    with init_empty_weights():
        if hasattr(component_class, "load_config"):
            config = component_class.load_config(folder, local_files_only=True)
            return component_class.from_config({**config, **changes}).eval()
        config = component_class.config_class.from_pretrained(folder, local_files_only=True)
        return component_class(config).eval()


def component_classes(path: Path) -> Iterator[tuple[str, Any]]:
    """The components of a folder in diffusers' layout and their classes."""
    index = json.loads((path / PIPELINE_FILE).read_text(encoding="utf-8"))
    for name, entry in index.items():
        match entry:
            case ["diffusers" | "transformers" as library, str(class_name)]:
                yield name, getattr(importlib.import_module(library), class_name)


def assign_weights(network: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Give a network its weights, in a dtype."""
    expected = network.state_dict()
    in_float32: Any = (
        (getattr(network, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
    )
    weights: dict[str, Tensor] = {}
    for name in expected:
        is_kept = any(module in name.split(".") for module in in_float32)
        weight = tensors[name]
        if weight.is_floating_point():
            weight = weight.to(torch.float32 if is_kept else dtype)
        weights[name] = weight.contiguous()
    network.load_state_dict(weights, assign=True)
    if hasattr(network, "tie_weights"):
        network.tie_weights()  # pyright: ignore[reportCallIssue]  a method of transformers' classes
    network.requires_grad_(False)
