"""Check what the settings say of a model by its folder, before the model is added to the store or loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hypergen.config import EngineSettings
from hypergen.engine_client.accelerators import find_device
from hypergen.errors import InvalidRequestError, ModelError
from hypergen.model_families import PIPELINES
from hypergen.model_store.diffusers_layout import pipeline_class_of
from hypergen.model_store.lora_files import open_registry, split_name
from hypergen.model_store.model_arguments import check_options
from hypergen.model_store.model_check import refuse_unusable, refuse_unusable_loras
from hypergen.model_store.setting_checks import check_settings, may_take_attention
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
        loras: names of those of a request, beside those of the settings.

    Attributes:
        is_done: the model was imported, and checked then.
    """

    name: str
    options: ModelOptions
    engine: EngineSettings
    alone: bool
    more: Callable[[Path], None] | None = None
    loras: Collection[str] = ()
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
        check_options(folder, self.options)
        check_settings(folder, self.engine, find_device(self.engine), alone=self.alone)

    def with_torch(self, folder: Path, *, is_stored: bool = False) -> None:
        """The rest, in processes that take seconds.

        Args:
            is_stored: the model itself was checked when it was imported.
        """
        try:
            if not is_stored or self._needs_torch(folder):
                self._check_networks(folder)
            loras = self._lora_files(folder)
            if loras:
                refuse_unusable_loras(folder, self.engine.max_lora_mb, loras)
        except ModelError as error:
            if self.alone:
                raise
            raise ModelError(f"{self.name}: {error}") from None

    def _check_networks(self, folder: Path) -> None:
        vae = os.path.expanduser(self.options.vae or "")
        options = self.options.model_copy(update={"vae": vae if os.path.exists(vae) else None})
        engine = self.engine
        if not self._takes_attention(folder):
            engine = engine.model_copy(update={"attention": None})
        refuse_unusable(folder, options, engine)

    def _lora_files(self, folder: Path) -> dict[str, Path]:
        """The LoRAs that are named, except for the model's own: name -> file. Others of `--lora-dir` are read
        when a request uses them.
        """
        registry = open_registry(self.engine, folder)
        names = [split_name(given)[0] or registry.default for given in self.engine.lora]
        files: dict[str, Path] = {}
        for name in filter(None, (*names, *self.loras)):
            with suppress(InvalidRequestError):  # the model may have it, once it is downloaded
                files[name] = registry.path_of(name)
        return {name: file for name, file in files.items() if not file.is_relative_to(folder)}

    def _takes_attention(self, folder: Path) -> bool:
        """Whether a wrong `--attention` is an error; with several models, it may be for another one."""
        is_known = pipeline_class_of(folder, self.name) in PIPELINES
        return self.alone or (is_known and may_take_attention(folder))

    def _needs_torch(self, folder: Path) -> bool:
        """Whether there are settings that may not fit the model's networks."""
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
            or (engine.attention and self._takes_attention(folder))
            or (is_pipeline and engine.vae_tiling != "off")
            or (any(of_device) and find_device(engine) is None)
        )
