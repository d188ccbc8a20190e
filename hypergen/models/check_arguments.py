"""Settings that a model cannot have, found in its networks without their weights; a part of `check_model`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hypergen.config import EngineSettings
from hypergen.errors import SettingError, of_setting
from hypergen.lora.files import families_by_width
from hypergen.lora.textual_inversion import read_embeddings
from hypergen.model_families import PIPELINES, REFINER_PIPELINE
from hypergen.model_store.diffusers_layout import pipeline_class_of
from hypergen.model_store.setting_checks import check_device_settings
from hypergen.models.check_network import check_network
from hypergen.models.loading import choose_device, use_attention_backend
from hypergen.models.memory import check_tiling
from hypergen.models.model_options import check_vae
from hypergen.models.networks import component_classes, empty_network
from hypergen.served_model_config import ModelOptions


def check_arguments(path: Path, options: ModelOptions, settings: EngineSettings) -> None:
    """
    Args:
        options: its VAE is a path.
        settings: ControlNets that are not on this machine are not checked.

    Raises:
        SettingError: one does not fit.
    """
    pipeline_class = pipeline_class_of(path, str(path))
    if pipeline_class == REFINER_PIPELINE:  # it has the settings of its base model
        return
    check_device_settings(settings, choose_device(settings).type)
    classes = dict(component_classes(path))
    if options.vae is not None:
        with of_setting("vae"):
            check_vae(Path(options.vae), path)
    for name, folder in settings.controlnet.items():
        fault = check_network("ControlNetModel", Path(folder), path).fault if os.path.isabs(folder) else None
        if fault:
            raise SettingError("controlnet", f"'{name}' ({folder}): {fault}", item=name)
    if settings.embedding:
        _check_embeddings(path, pipeline_class, classes, settings)
    denoiser = next((name for name in ("unet", "transformer") if name in classes), None)
    if settings.attention is not None:
        network = None if denoiser is None else empty_network(path / denoiser, classes[denoiser])
        use_attention_backend(network, settings.attention, pipeline_class)
    if settings.vae_tiling != "off" and "vae" in classes:
        check_tiling(empty_network(path / "vae", classes["vae"]))


def _check_embeddings(
    path: Path, pipeline_class: str, classes: dict[str, Any], settings: EngineSettings
) -> None:
    unet: Any = empty_network(path / "unet", classes["unet"])
    families = families_by_width(pipeline_class, unet.config.cross_attention_dim)
    read_embeddings(settings.embedding, text_widths(path, classes), families)


def text_widths(path: Path, classes: dict[str, Any]) -> dict[str, int]:
    """As `embedding_widths` of a pipeline: text encoder -> width of its token embeddings."""
    spec = PIPELINES.get(pipeline_class_of(path, str(path)))
    if spec is None or "embedding" not in spec.settings:
        return {}
    encoders: dict[str, Any] = {
        name: empty_network(path / name, classes[name])
        for name in ("text_encoder", "text_encoder_2")
        if name in classes
    }
    return {name: encoder.get_input_embeddings().embedding_dim for name, encoder in encoders.items()}
