"""Settings that do not apply to a model or to a device, found without torch."""

from __future__ import annotations

from hypergen.config import EngineSettings
from hypergen.errors import ModelError
from hypergen.model_families import FAMILIES, FamilySetting, FamilySpec

# Settings that only apply to models with step-level batching.
_STEP_LEVEL = ("compile",)
_FAMILY_SETTINGS: tuple[FamilySetting, ...] = (
    "refiner",
    "controlnet",
    "embedding",
    "prompt_weighting",
    "lora",
)


def check_family_settings(settings: EngineSettings, spec: FamilySpec | None, name: str) -> None:
    for setting in _FAMILY_SETTINGS:
        if getattr(settings, setting) and (spec is None or setting not in spec.settings):
            families = ", ".join(sorted(s.name for s in FAMILIES.values() if setting in s.settings))
            raise ModelError(f"{flag_of(setting)} is only supported for {families} models; this is {name}.")


def ignored_settings(settings: EngineSettings, spec: FamilySpec | None) -> list[str]:
    """Settings that were changed but do not apply to a model."""
    ignored = [*(() if spec else _STEP_LEVEL), *(() if spec and "lora" in spec.settings else ("lora_dir",))]
    fields = EngineSettings.model_fields
    return [name for name in ignored if getattr(settings, name) != fields[name].get_default()]


def flag_of(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


def check_device_settings(settings: EngineSettings, device_type: str) -> None:
    """Refuse settings that a device does not support.

    Raises:
        ModelError: names the setting.
    """
    if settings.offload != "off" and device_type != "cuda":
        raise ModelError(
            f"--offload needs a CUDA device, whose memory is its own; this model runs on {device_type}."
        )
    if device_type != "mps":
        return
    if settings.compile != "off":
        raise ModelError("--compile needs a CUDA device or a CPU; this model runs on mps.")
    if settings.quantization == "fp8":
        raise ModelError("--quantization fp8 needs a CUDA device or a CPU: mps has no float8; use int8.")
