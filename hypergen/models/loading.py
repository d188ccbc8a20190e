"""Loading: from a folder in diffusers' layout to a family ready to draw."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from hypergen.conditioning import controlnet
from hypergen.config import EngineSettings
from hypergen.errors import ModelError
from hypergen.models.family import Family
from hypergen.models.registry import FAMILIES, family_class

logger = logging.getLogger(__name__)


def load(path: Path, settings: EngineSettings) -> Family:
    """Load the model in `path` onto the device that the settings name, or the best there is.

    Raises:
        ModelError: the folder is of no known family, or its files do not fit together.
    """
    family = import_family(path)
    card_file = path / "hypergen.json"
    card: dict[str, Any] = json.loads(card_file.read_text(encoding="utf-8")) if card_file.exists() else {}
    device = choose_device(settings)
    dtype = choose_dtype(settings, device, card)
    try:
        pipeline: Any = family.pipeline_class.from_pretrained(
            path, dtype=dtype, use_safetensors=True, local_files_only=True, safety_checker=None
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        logger.exception("Loading %s failed.", path)
        # Without the path: /health shows the reason to everybody.
        reason = " ".join(str(error).replace(str(path), "the model").split())
        raise ModelError(f"{type(error).__name__}: {reason[:300]}") from None
    pipeline.to(device)
    loaded = family(pipeline, card, settings)
    loaded.control_models = controlnet.load(settings.controlnet, loaded.denoiser, dtype)
    return loaded


def import_family(path: Path) -> Any:
    """The family of the model in `path`; importing it takes longer than loading small weights.

    Raises:
        ModelError: the folder is of no known family.
    """
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    name = index.get("_class_name")
    if name not in FAMILIES:
        raise ModelError(f"It is a {name}; HyperGen draws with {', '.join(sorted(FAMILIES))}.")
    return family_class(name)


def choose_device(settings: EngineSettings) -> torch.device:
    """The device of the settings, checked, or the best one of this machine.

    Raises:
        ModelError: the settings name a device that this machine does not have.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if settings.device is None:
        return torch.device(next(name for name, available in there.items() if available))
    if not there[settings.device]:
        has = ", ".join(name for name, available in there.items() if available)
        raise ModelError(f"There is no {settings.device} device here; this machine has {has}.")
    return torch.device(settings.device)


def choose_dtype(settings: EngineSettings, device: torch.device, card: dict[str, Any]) -> torch.dtype:
    """The precision of the settings, else the model's own wish, else what the device is fast at."""
    name = settings.dtype or card.get("dtype")
    if name is not None:
        return getattr(torch, name)
    if device.type != "cpu":
        return torch.float16
    # Without these instructions bfloat16 is emulated, and slower than float32.
    return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    flags = Path("/proc/cpuinfo")
    words = set(flags.read_text(encoding="utf-8", errors="replace").split()) if flags.exists() else set[str]()
    return bool(words & {"avx512_bf16", "amx_bf16"})
