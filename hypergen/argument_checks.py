"""Check what the settings say of a model by its folder, before the model is added to the store or loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypergen.config import EngineSettings
from hypergen.engine_client.accelerators import find_device
from hypergen.errors import ModelError
from hypergen.model_families import PIPELINES
from hypergen.model_store.diffusers_layout import pipeline_class_of
from hypergen.model_store.lora_files import open_registry
from hypergen.model_store.model_arguments import check_options
from hypergen.model_store.model_check import fault_of_loras, refuse_unusable
from hypergen.model_store.setting_checks import check_settings
from hypergen.served_model_config import ModelOptions


@dataclass
class ArgumentChecks:
    """The checks of one model.

    Args:
        name: of the model, for messages.
        options: of its served-model file; its VAE is a path, or on the hub.
        engine: with the refiner of the model.
        alone: it is the only served model.
        more: further checks of its folder, before it is imported.

    Attributes:
        is_done: the model was imported, and checked then.
    """

    name: str
    options: ModelOptions
    engine: EngineSettings
    alone: bool
    more: Callable[[Path], None] | None = None
    is_done: bool = False

    def before_import(self, folder: Path) -> None:
        """
        Raises:
            HyperGenError: the model cannot be loaded with these settings.
        """
        self.without_torch(folder)
        if self.more is not None:
            self.more(folder)
        self.with_torch(folder)
        self.is_done = True

    def without_torch(self, folder: Path) -> None:
        """What configurations tell, in milliseconds."""
        try:
            check_options(folder, self.options)
        except ModelError as error:
            raise ModelError(f"{self.name}: {error}") from None
        check_settings(folder, self.engine, find_device(self.engine), alone=self.alone)

    def with_torch(self, folder: Path) -> None:
        """The rest, in a process that takes seconds."""
        vae = os.path.expanduser(self.options.vae or "")
        options = self.options.model_copy(update={"vae": vae if os.path.exists(vae) else None})
        # With several models, it may be for another one.
        engine = self.engine if self.alone else self.engine.model_copy(update={"attention": None})
        refuse_unusable(folder, options, engine)
        default = self._default_lora(folder)
        if default and (fault := fault_of_loras(folder, engine.max_lora_mb, default)):
            raise ModelError(fault)

    def _default_lora(self, folder: Path) -> dict[str, Path]:
        """The LoRA that is loaded with the model, if any: its name and file."""
        registry = open_registry(self.engine, folder)
        return {} if registry.default is None else {registry.default: registry.files[registry.default]}

    def needs_torch(self, folder: Path) -> bool:
        """Whether `without_torch` leaves settings that may not fit the model."""
        options, engine = self.options, self.engine
        is_pipeline = pipeline_class_of(folder, self.name) not in PIPELINES
        of_device = engine.device_type, engine.offload != "off"
        return bool(
            options.vae
            or options.prediction_type
            or options.zero_terminal_snr is not None
            or options.timestep_spacing
            or engine.controlnet
            or engine.embedding
            or self._default_lora(folder)
            or (self.alone and engine.attention)
            or (is_pipeline and engine.vae_tiling != "off")
            or (any(of_device) and find_device(engine) is None)
        )
