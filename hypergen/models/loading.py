"""Load a folder in diffusers' layout as a model family or a full pipeline."""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from hypergen.conditioning import controlnet
from hypergen.config import EngineSettings
from hypergen.errors import ModelError, SettingError
from hypergen.model_families import PIPELINES, servable
from hypergen.model_store.checkpoint_file import options_of
from hypergen.model_store.diffusers_layout import CHECKPOINT, LORAS, safetensors_header
from hypergen.model_store.model_arguments import check_options
from hypergen.model_store.setting_checks import (
    check_refiner,
    check_settings,
    ignored_settings,
    no_attention_backends,
)
from hypergen.models import attention
from hypergen.models.diffusers_pipeline import DiffusersPipeline
from hypergen.models.family import Family
from hypergen.models.folder_accounting import account_for_folder
from hypergen.models.memory import apply_memory_settings, direct_device
from hypergen.models.model_options import apply_options, check_configurations, load_vae
from hypergen.models.networks import OLD_FEATURE_EXTRACTOR
from hypergen.models.single_file_loading import load_networks
from hypergen.served_model_config import ModelOptions

logger = logging.getLogger(__name__)


def load(path: Path, settings: EngineSettings) -> Family:
    """`load_any` for models with step-level batching.

    Raises:
        ModelError: also if the model is a full pipeline.
    """
    model = load_any(path, settings)
    if isinstance(model, DiffusersPipeline):
        raise ModelError(
            f"{model.name} has no step-level implementation; it can only run as a full diffusers pipeline."
        )
    return model


def load_any(
    path: Path,
    settings: EngineSettings,
    defaults: Mapping[str, Any] | None = None,
    options: ModelOptions | None = None,
    *,
    alone: bool = True,
) -> Family | DiffusersPipeline:
    """Load the model in `path` onto the device of the settings, or the best available one.

    Args:
        defaults: default values of requests, in addition to the model's own.
        options: what its files do not state.
        alone: it is the only served model: settings that do not apply to it are errors, otherwise warnings.

    Raises:
        ModelError: unsupported pipeline, or the files do not match.
        SettingError: a setting does not apply to it.
    """
    pipeline_class, family = import_family(path)
    spec = family.spec if family else None
    name = spec.name if spec else pipeline_class.__name__
    device = choose_device(settings)
    check_settings(path, settings, device.type, alone=alone)
    for setting in ignored_settings(settings, spec):  # they may be for another of several models
        logger.warning("%s is not supported for %s.", setting, name)
    check_options(path, options or ModelOptions())
    if settings.refiner:
        check_refiner(Path(settings.refiner), path, settings.refiner)
    model_card = _read_model_card(path)
    model_card["defaults"] = {**model_card.get("defaults", {}), **(defaults or {})}
    half_dtype = family.half_dtype if family else torch.bfloat16
    dtype = choose_dtype(settings, device, model_card, half_dtype)
    options = options_of(path, options or ModelOptions())
    direct = direct_device(settings, device)
    replaced = {"vae": load_vae(Path(options.vae), path, dtype, direct)} if options.vae else {}
    pipeline = load_pipeline(pipeline_class, path, dtype, direct, replaced=replaced)
    apply_options(pipeline, path, options)
    if spec is not None:
        check_configurations(path, spec, pipeline.scheduler, type(pipeline.vae))
    pipeline = apply_memory_settings(pipeline, settings, device)
    if settings.attention is not None:
        denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
        use_attention_backend(denoiser, settings.attention, name, alone=alone)
    if family is None:
        return DiffusersPipeline(pipeline, model_card)
    model = family(pipeline, model_card, settings)
    model.set_options(options)
    if settings.vae_dtype is not None:
        model.vae.to(getattr(torch, settings.vae_dtype))
    if settings.controlnet:
        model.controlnets = controlnet.load(settings.controlnet, pipeline.unet, dtype)
    return model


def use_attention_backend(denoiser: Any, backend: str, name: str, *, alone: bool = True) -> None:
    """
    Args:
        denoiser: None: the pipeline has none.
        alone: see `load_any`.

    Raises:
        SettingError: the denoiser has no backends, or not this one.
    """
    if denoiser is not None and attention.supports_attention_backends(denoiser):
        attention.set_attention_backend(denoiser, backend)
    elif alone:
        raise SettingError("attention", no_attention_backends(name))
    else:
        logger.warning("attention %s", no_attention_backends(name))


def expected_bytes(path: Path, settings: EngineSettings) -> int:
    """Bytes of the weights of the model in `path` in memory, without refiner and ControlNets.

    Raises:
        ModelError: as `load_any`.
    """
    _, family = import_family(path)
    half_dtype = family.half_dtype if family else torch.bfloat16
    dtype = choose_dtype(settings, choose_device(settings), _read_model_card(path), half_dtype)
    return _count_weights(path) * dtype.itemsize


def _count_weights(folder: Path) -> int:
    """Number of parameters of a model, from the headers of its files."""
    total = 0
    for file in sorted(folder.rglob("*.safetensors")):
        name = file.relative_to(folder).as_posix()
        if not name.startswith(f"{LORAS}/"):
            tensors = json.loads(safetensors_header(file, str(folder), name))
            total += sum(math.prod(t["shape"]) for key, t in tensors.items() if key != "__metadata__")
    return total


def weight_bytes(networks: Iterable[nn.Module]) -> int:
    """Bytes of the weights; those that networks share count once."""
    tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    return sum({id(tensor): _bytes(tensor) for tensor in tensors}.values())


def _bytes(tensor: torch.Tensor) -> int:
    # The layout of oneDNN's kernels may pad a reordered weight.
    return torch.ops.mkldnn._nbytes(tensor) if tensor.is_mkldnn else tensor.nbytes


def _read_model_card(path: Path) -> dict[str, Any]:
    """The model's `hypergen.json`: properties that diffusers' files do not have."""
    file = path / "hypergen.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def load_pipeline(
    pipeline_class: Any,
    path: Path,
    dtype: torch.dtype,
    device: torch.device | None = None,
    *,
    without: Collection[str] = (),
    replaced: Mapping[str, Any] | None = None,
) -> Any:
    """Load a diffusers pipeline.

    Args:
        device: where to load the weights, tensor by tensor; None: the CPU. Those of folders with pipelines
            that diffusers cannot load so are on the CPU in any case.
        without: components to skip.
        replaced: components that come from elsewhere.

    Raises:
        ModelError: the files do not match.
    """
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    # diffusers requires an explicit None for some components that are null in the index, such as SD 3's T5.
    empty = ([None, None], OLD_FEATURE_EXTRACTOR)
    left_out = {name: None for name, entry in index.items() if entry in empty or name in without}
    if "safety_checker" in inspect.signature(pipeline_class.__init__).parameters:
        left_out["safety_checker"] = None
    device_map = None if device is None or pipeline_class._load_connected_pipes else device.type
    try:
        given: dict[str, Any] = {**left_out, **(replaced or {})}
        if (path / CHECKPOINT).is_file():
            given |= load_networks(path, dtype, given, device)
        if fault := account_for_folder(path, given).fault:
            raise ModelError(fault)
        return pipeline_class.from_pretrained(
            path, dtype=dtype, device_map=device_map, use_safetensors=True, local_files_only=True, **given
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        logger.exception("Loading %s failed.", path)
        # Without the path: /health is public.
        reason = " ".join(str(error).replace(str(path), "the model").split())
        raise ModelError(f"{type(error).__name__}: {reason[:300]}") from None


def import_family(path: Path) -> tuple[Any, type[Family] | None]:
    """The pipeline class of the model in `path`, and its family; None: it runs as a full pipeline.

    The import takes longer than loading small weights.

    Raises:
        ModelError: unknown pipeline class.
    """
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    name = index.get("_class_name")
    if (spec := PIPELINES.get(name)) is not None:
        return getattr(diffusers, spec.pipelines[0]), spec.import_class()
    pipeline_class = getattr(diffusers, str(name), None) if name in servable() else None
    if not (isinstance(pipeline_class, type) and issubclass(pipeline_class, diffusers.DiffusionPipeline)):
        raise ModelError(f"{name} is not a pipeline of the installed diffusers.")
    return pipeline_class, None


def choose_device(settings: EngineSettings) -> torch.device:
    """The device of the settings, or the best one of this machine.

    Raises:
        SettingError: this machine does not have the device of the settings.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    wanted = settings.device_type
    if wanted is None:
        return _device(next(name for name, present in available.items() if present))
    if not available[wanted]:
        names = ", ".join(name for name, present in available.items() if present)
        setting = "devices" if settings.devices else "device"
        raise SettingError(setting, f"{wanted}: not available; this machine has {names}.")
    return _device(wanted)


def _device(name: str) -> torch.device:
    """With its index, as in `tensor.device`; an engine process sees one accelerator."""
    return torch.device(name) if name == "cpu" else torch.device(name, 0)


def choose_dtype(
    settings: EngineSettings, device: torch.device, model_card: dict[str, Any], half_dtype: torch.dtype
) -> torch.dtype:
    """The dtype of the settings, else of the model card, else the fastest one of the device.

    Args:
        half_dtype: the family's 16-bit dtype for accelerators; float16 replaces bfloat16 where a GPU only
            emulates it.
    """
    name = settings.dtype or model_card.get("dtype")
    if name is not None:
        return getattr(torch, name)
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    if device.type != "cpu":
        return half_dtype
    # Without these instructions bfloat16 is emulated, and slower than float32.
    return torch.bfloat16 if _cpu_supports_bfloat16() else torch.float32


def _cpu_supports_bfloat16() -> bool:
    flags = Path("/proc/cpuinfo")
    text = flags.read_text(encoding="utf-8", errors="replace") if flags.exists() else ""
    return bool({"avx512_bf16", "amx_bf16"}.intersection(text.split()))
