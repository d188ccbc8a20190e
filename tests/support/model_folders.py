"""Small model folders, and helpers for tests of the model store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hypergen.errors import ModelError, SettingError

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.38.0",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_model(folder: Path, index: dict[str, Any] = INDEX) -> Path:
    """A folder in diffusers layout with tiny weights."""
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("A model.")
    for component in ("unet", "vae"):
        (folder / component).mkdir()
        (folder / component / "config.json").write_text("{}")
        save_file({"weight": np.arange(64, dtype=np.float32)}, folder / component / WEIGHTS)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "merges.txt").write_text("a b")
    return folder


def files_of(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def error_message(function: Any, *arguments: Any, **options: Any) -> str:
    """The one-line message of the error that a call raises."""
    with pytest.raises((ModelError, SettingError)) as raised:
        function(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)
