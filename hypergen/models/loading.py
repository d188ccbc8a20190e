"""Loading: from a folder in diffusers' layout to a family ready to draw."""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from torch import nn

from hypergen.conditioning import controlnet
from hypergen.config import EngineSettings
from hypergen.errors import ModelError
from hypergen.model_families import FAMILIES, family_class, servable
from hypergen.model_store.diffusers_layout import CHECKPOINT, LORAS, safetensors_header
from hypergen.models.diffusers_pipeline import DiffusersPipeline
from hypergen.models.family import Family
from hypergen.models.memory import apply_memory_settings
from hypergen.models.single_file_loading import load_checkpoint

logger = logging.getLogger(__name__)

_READ_BY_CLIP = ("sd", "sdxl", "sd3")
# Settings of the engine that a pipeline which is drawn whole has no use for.
_STEP_BY_STEP = (
    "compile",
    "channels_last",
    "attention",
    "decode_stream",
    "batched_euler",
)
_WITH_LORAS = ("sd", "sdxl", "flux")
_WITH_LORAS_IN_WORDS = "Stable Diffusion, SDXL and FLUX"


def load(path: Path, settings: EngineSettings) -> Family:
    """`load_any` for a model that is drawn step by step.

    Raises:
        ModelError: also when it is not.
    """
    model = load_any(path, settings)
    if isinstance(model, DiffusersPipeline):
        raise ModelError(f"It is a {model.name}, which is drawn whole and not step by step.")
    return model


def load_any(
    path: Path, settings: EngineSettings, defaults: Mapping[str, Any] | None = None, *, alone: bool = True
) -> Family | DiffusersPipeline:
    """Load the model in `path` onto the device that the settings name, or the best there is.

    Args:
        defaults: what requests get that do not say, in place of the model's own.
        alone: no other model is served that settings could be meant for, so that those which this one has no
            use for are refused.

    Raises:
        ModelError: the folder is of no pipeline that can be served, or its files do not fit together.
    """
    pipeline_class, family = import_family(path)
    if settings.refiner is not None and (family is None or family.name != "sdxl"):
        raise ModelError("A refiner goes with Stable Diffusion XL; this model is of another kind.")
    if settings.prompt_weighting and (family is None or family.name not in _READ_BY_CLIP):
        raise ModelError(
            "Prompt weighting goes with Stable Diffusion, SDXL and SD 3, whose words CLIP reads."
        )
    if family is None and settings.controlnet:
        raise ModelError("Control models steer models with a UNet; this one is drawn whole.")
    if settings.lora and (family is None or family.name not in _WITH_LORAS):
        raise ModelError(f"LoRAs go with {_WITH_LORAS_IN_WORDS}; this model takes none.")
    for message in _unused(family.name if family else None, settings):
        if alone:
            raise ModelError(message)
        logger.warning("%s: %s", path.name, message)
    model_card = _read_model_card(path)
    model_card["defaults"] = {**model_card.get("defaults", {}), **(defaults or {})}
    device = choose_device(settings)
    half_dtype = family.half_dtype if family else torch.bfloat16
    dtype = choose_dtype(settings, device, model_card, half_dtype)
    pipeline = apply_memory_settings(load_pipeline(pipeline_class, path, dtype), settings, device)
    if family is None:
        return DiffusersPipeline(pipeline, model_card)
    loaded: Family = family(pipeline, model_card, settings)
    unet = getattr(pipeline, "unet", None)  # not the denoiser, which may have a refiner in it
    loaded.controlnets = controlnet.load(settings.controlnet, unet, dtype)
    return loaded


def _unused(family: str | None, settings: EngineSettings) -> Iterator[str]:
    """What to say of settings that a model of this family has no use for; None: it is drawn whole."""
    uses: dict[str, str] = dict.fromkeys(() if family else _STEP_BY_STEP, "models drawn step by step")
    if family not in _WITH_LORAS:
        uses["lora_dir"] = _WITH_LORAS_IN_WORDS
    for name, use in uses.items():
        if getattr(settings, name) != EngineSettings.model_fields[name].get_default():
            yield f"The setting {name} goes with {use}, not with this model."


def expected_bytes(path: Path, settings: EngineSettings) -> int:
    """What the weights of the model in `path` will take in memory, without what is loaded beside them.

    Raises:
        ModelError: as `load_any`.
    """
    _, family = import_family(path)
    half_dtype = family.half_dtype if family else torch.bfloat16
    dtype = choose_dtype(settings, choose_device(settings), _read_model_card(path), half_dtype)
    return _count_weights(path) * dtype.itemsize


def _count_weights(folder: Path) -> int:
    """Numbers in all weights of a model of the store, by their headers."""
    total = 0
    for file in sorted(folder.rglob("*.safetensors")):
        name = file.relative_to(folder).as_posix()
        if not name.startswith(f"{LORAS}/"):
            tensors = json.loads(safetensors_header(file, str(folder), name))
            total += sum(math.prod(t["shape"]) for key, t in tensors.items() if key != "__metadata__")
    return total


def weight_bytes(model: Family | DiffusersPipeline) -> int:
    """What all networks take that a loaded model keeps, control models and refiner too."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    objects: list[Any] = [model]
    while objects:
        thing = objects.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            found |= {id(t): t.nbytes for t in (*thing.parameters(), *thing.buffers())}
        elif isinstance(thing, diffusers.DiffusionPipeline):
            objects += thing.components.values()
        elif isinstance(thing, Mapping):
            objects += cast(Mapping[Any, Any], thing).values()
        elif type(thing).__module__.startswith("hypergen."):
            objects += getattr(thing, "__dict__", {}).values()
    return sum(found.values())


def _read_model_card(path: Path) -> dict[str, Any]:
    """What diffusers' files cannot say about a model."""
    file = path / "hypergen.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def load_pipeline(pipeline_class: Any, path: Path, dtype: torch.dtype, without: Collection[str] = ()) -> Any:
    """A pipeline of diffusers, on the CPU.

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
        if (path / CHECKPOINT).is_file():
            return load_checkpoint(pipeline_class, path, dtype, left_out)
        return pipeline_class.from_pretrained(
            path, dtype=dtype, use_safetensors=True, local_files_only=True, **left_out
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        logger.exception("Loading %s failed.", path)
        # Without the path: /health shows the reason to everybody.
        reason = " ".join(str(error).replace(str(path), "the model").split())
        raise ModelError(f"{type(error).__name__}: {reason[:300]}") from None


def import_family(path: Path) -> tuple[Any, Any]:
    """The pipeline class of the model in `path` and its family, or None where it is to be drawn whole.

    Importing them takes longer than loading small weights.

    Raises:
        ModelError: the folder is of no pipeline that can be served.
    """
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    name = index.get("_class_name")
    if name in FAMILIES:
        family = family_class(name)
        return family.pipeline_class, family
    pipeline_class = getattr(diffusers, str(name), None) if name in servable() else None
    if not (isinstance(pipeline_class, type) and issubclass(pipeline_class, diffusers.DiffusionPipeline)):
        raise ModelError(f"It is a {name}, which is no pipeline of the installed diffusers.")
    return pipeline_class, None


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
    settings: EngineSettings, device: torch.device, model_card: dict[str, Any], half_dtype: torch.dtype
) -> torch.dtype:
    """The precision of the settings, else the model's own wish, else what the device is fast at.

    Args:
        half_dtype: the family's choice of 16 bits, for accelerators.
    """
    name = settings.dtype or model_card.get("dtype")
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
