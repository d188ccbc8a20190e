"""Check LoRA files for a model whose weights are not loaded:
`python -m hypergen.models.check_loras MODEL MAX_BYTES NAME=FILE...`.

It runs before the model is loaded. Prints one line of JSON: see `Report`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from hypergen.lora.factors import IncompatibleLoraError
from hypergen.lora.files import families_by_width
from hypergen.lora.layer_names import LayerNames
from hypergen.lora.weights import read_lora
from hypergen.model_store.diffusers_layout import pipeline_class_of
from hypergen.model_store.model_check import Report
from hypergen.models.check_arguments import text_widths
from hypergen.models.networks import component_classes, empty_network

_NETWORKS = ("unet", "transformer", "text_encoder", "text_encoder_2")


def check_loras(model: Path, max_bytes: float, files: Mapping[str, Path]) -> Report:
    """
    Args:
        files: name of a request -> file.
    """
    classes = dict(component_classes(model))
    # Memory that is never written takes no space.
    networks: dict[str, Any] = {
        name: empty_network(model / name, classes[name]).to_empty(device=torch.device("cpu"))
        for name in _NETWORKS
        if name in classes
    }
    width = networks["unet"].config.cross_attention_dim if "unet" in networks else None
    families = families_by_width(pipeline_class_of(model, str(model)), width)
    names, widths = LayerNames(SimpleNamespace(**networks)), text_widths(model, classes)
    for name, file in files.items():
        try:
            read_lora(file, names, families, widths, max_bytes)
        except IncompatibleLoraError as error:
            return Report(f"'{name}' {error}.", {}, "lora", name)
    return Report(None, {})


if __name__ == "__main__":
    given = dict(pair.split("=", 1) for pair in sys.argv[3:])
    found = {name: Path(file) for name, file in given.items()}
    print(json.dumps(asdict(check_loras(Path(sys.argv[1]), float(sys.argv[2]), found))))
