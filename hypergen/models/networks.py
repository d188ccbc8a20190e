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

from hypergen.errors import ModelError
from hypergen.model_store.diffusers_layout import PIPELINE_FILE

# transformers 5 has removed it, and older models name it. Only the safety checker needs it.
OLD_FEATURE_EXTRACTOR = ["transformers", "CLIPFeatureExtractor"]
# What loading configurations and vocabularies raises for damaged files.
DAMAGED = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError)


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


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
    """The components of a folder in diffusers' layout and their classes.

    Raises:
        ModelError: the installed version of a library does not have a class.
    """
    index = json.loads((path / PIPELINE_FILE).read_text(encoding="utf-8"))
    for name, entry in index.items():
        if entry == OLD_FEATURE_EXTRACTOR:
            continue
        match entry:
            case ["diffusers" | "transformers" as library, str(class_name)]:
                component_class = getattr(importlib.import_module(library), class_name, None)
                if component_class is None:
                    raise ModelError(
                        f"{PIPELINE_FILE} has a {class_name} as {name}, which the installed {library} does "
                        "not have."
                    )
                yield name, component_class


def assign_weights(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> None:
    """Give a network its weights, in a dtype, and move it to a device, tensor by tensor; None: the CPU."""
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
        weights[name] = weight.contiguous().to(device=device)
    network.load_state_dict(weights, assign=True)
    if hasattr(network, "tie_weights"):
        network.tie_weights()  # pyright: ignore[reportCallIssue]  a method of transformers' classes
    network.requires_grad_(False)
    if device is not None:
        network.to(device)  # buffers that no file has
