"""Loading: from a folder in diffusers' layout to a family ready to draw."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

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
    if settings.refiner is not None and family.name != "sdxl":
        raise ModelError(
            f"A refiner goes with Stable Diffusion XL; this model is of the family {family.name}."
        )
    card_file = path / "hypergen.json"
    card: dict[str, Any] = json.loads(card_file.read_text(encoding="utf-8")) if card_file.exists() else {}
    device = choose_device(settings)
    dtype = choose_dtype(settings, device, card, family.half_dtype)
    pipeline = load_pipeline(family.pipeline_class, path, dtype, device)
    return family(pipeline, card, settings)


def load_pipeline(
    pipeline_class: Any, path: Path, dtype: torch.dtype, device: torch.device, without: Collection[str] = ()
) -> Any:
    """A pipeline of diffusers with its weights on the device.

    Args:
        without: components that are not loaded.

    Raises:
        ModelError: the files do not fit together.
    """
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    # Not every component that is null in the index may be left out without a word, such as SD 3's T5.
    left_out = {name: None for name, entry in index.items() if entry == [None, None] or name in without}
    if "safety_checker" in inspect.signature(pipeline_class.__init__).parameters:
        left_out["safety_checker"] = None
    try:
        pipeline: Any = pipeline_class.from_pretrained(
            path, dtype=dtype, use_safetensors=True, local_files_only=True, **left_out
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        logger.exception("Loading %s failed.", path)
        # Without the path: /health shows the reason to everybody.
        reason = " ".join(str(error).replace(str(path), "the model").split())
        raise ModelError(f"{type(error).__name__}: {reason[:300]}") from None
    return pipeline.to(device)


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


def choose_dtype(
    settings: EngineSettings, device: torch.device, card: dict[str, Any], half_dtype: torch.dtype
) -> torch.dtype:
    """The precision of the settings, else the model's own wish, else what the device is fast at.

    Args:
        half_dtype: the family's choice of 16 bits, for accelerators.
    """
    name = settings.dtype or card.get("dtype")
    if name is not None:
        return getattr(torch, name)
    if device.type != "cpu":
        return half_dtype
    # Without these instructions bfloat16 is emulated, and slower than float32.
    return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    flags = Path("/proc/cpuinfo")
    words = set(flags.read_text(encoding="utf-8", errors="replace").split()) if flags.exists() else set[str]()
    return bool(words & {"avx512_bf16", "amx_bf16"})
