"""Settings that do not apply to a model or to a device, found without torch."""

from __future__ import annotations

from pathlib import Path

from hypergen.config import EngineSettings
from hypergen.errors import SettingError, of_setting
from hypergen.model_families import FAMILIES, PIPELINES, FamilySetting, FamilySpec
from hypergen.model_store.diffusers_layout import (
    PIPELINE_FILE,
    check_folder,
    pipeline_class_of,
    read_components,
    read_json,
)
from hypergen.model_store.model_arguments import is_edm_model

# Settings that only apply to models with step-level batching.
_STEP_LEVEL = ("compile",)
_FAMILY_SETTINGS: tuple[FamilySetting, ...] = (
    "refiner",
    "controlnet",
    "embedding",
    "prompt_weighting",
    "lora",
)


def check_settings(
    folder: Path, settings: EngineSettings, device_type: str | None, *, alone: bool = True
) -> None:
    """
    Args:
        device_type: None: not known.
        alone: it is the only served model: settings that do not apply to it are errors.

    Raises:
        SettingError: one does not apply.
    """
    pipeline_class = pipeline_class_of(folder, str(folder))
    spec = PIPELINES.get(pipeline_class)
    name = spec.name if spec else pipeline_class
    for setting in _FAMILY_SETTINGS:
        if getattr(settings, setting) and (spec is None or setting not in spec.settings):
            families = ", ".join(sorted(s.name for s in FAMILIES.values() if setting in s.settings))
            raise SettingError(setting, f"is only supported for {families} models; this is {name}.")
    if settings.refiner and is_edm_model(folder):
        raise SettingError("refiner", "is not supported for models with an EDM scheduler.")
    components = read_components(folder / PIPELINE_FILE, str(folder))
    if settings.quantization != "off" and components.keys().isdisjoint(("unet", "transformer")):
        raise SettingError("quantization", "is only supported for models with a UNet or a transformer.")
    if alone:
        for setting in ignored_settings(settings, spec):
            raise SettingError(setting, f"is not supported for {name}.")
        if settings.attention and not may_take_attention(folder):
            raise SettingError("attention", no_attention_backends(name))
    if device_type is not None:
        check_device_settings(settings, device_type)


def ignored_settings(settings: EngineSettings, spec: FamilySpec | None) -> list[str]:
    """Settings that were changed but do not apply to a model."""
    ignored = [*(() if spec else _STEP_LEVEL), *(() if spec and "lora" in spec.settings else ("lora_dir",))]
    fields = EngineSettings.model_fields
    return [setting for setting in ignored if getattr(settings, setting) != fields[setting].get_default()]


def may_take_attention(folder: Path) -> bool:
    """Whether `attention` may apply to a model; of full pipelines only their networks tell."""
    spec = PIPELINES.get(pipeline_class_of(folder, str(folder)))
    return spec is None or "attention" in spec.settings


def no_attention_backends(name: str) -> str:
    return (
        f"is not supported for {name}, whose attention is always torch's; it is for FLUX and "
        "other transformers with diffusers' attention backends."
    )


def check_refiner(refiner: Path, base: Path, given: str) -> None:
    """
    Args:
        given: the refiner as in the settings.

    Raises:
        SettingError: it is not a refiner of the model in `base`.
    """
    with of_setting("refiner"):
        check_folder(refiner)
    name = "unet/config.json"
    widths = [read_json(folder / name, given, name).get("cross_attention_dim") for folder in (refiner, base)]
    if widths[0] == widths[1]:
        raise SettingError(
            "refiner", f"{given} is not a refiner of this model: its prompt embeddings have the same width."
        )


def check_device_settings(settings: EngineSettings, device_type: str) -> None:
    """Refuse settings that a device does not support.

    Raises:
        SettingError: one does not apply.
    """
    if settings.offload != "off" and device_type != "cuda":
        raise SettingError(
            "offload", f"needs a CUDA device, whose memory is its own; this model runs on {device_type}."
        )
    if device_type != "mps":
        return
    if settings.compile != "off":
        raise SettingError("compile", "needs a CUDA device or a CPU; this model runs on mps.")
    if settings.quantization == "fp8":
        raise SettingError("quantization", "fp8 needs a CUDA device or a CPU: mps has no float8; use int8.")
