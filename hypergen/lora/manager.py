"""LoraManager: the LoRAs of one loaded pipeline, from a request's names to the rows of a forward pass.

A family keeps one `LoraManager`, asks it for a request's LoRAs and hands them to its states; whoever runs
the pipeline's modules over rows does it inside `lora_context`.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from hypergen.config import EngineSettings
from hypergen.errors import ConfigurationError, InvalidRequestError, ModelError
from hypergen.lora.batched_lora import BatchSizeProbe, LoraBatch, Loras
from hypergen.lora.weights import IncompatibleLoraError, LayerWeights, Lora, read_weights
from hypergen.model_info import Capability
from hypergen.model_store.lora_files import LoraRegistry, open_registry

logger = logging.getLogger(__name__)

# Names with weights, as a request has them.
LoraWeights = tuple[tuple[str, float], ...]
# Name, size and time of a file: another one is read anew.
_Version = tuple[str, int, int]
# Settings under which there are no layers left to hook, or their weights are elsewhere when a LoRA is loaded.
_EXCLUDING = ("compile", "offload")


def _version_of(name: str, path: Path) -> _Version:
    status = os.stat(path)
    return name, status.st_size, status.st_mtime_ns


class LoraManager:
    """Loads LoRAs by name, from any thread, and applies them to passes of the pipeline's modules, on the
    engine's thread.

    Args:
        pipeline: of diffusers; its modules get hooks that do nothing in passes without a LoRA.

    Raises:
        ConfigurationError: a LoRA of the settings is not there, or the settings do not go together.
        ModelError: the server's default LoRA cannot be used with this model.
    """

    def __init__(self, pipeline: Any, settings: EngineSettings) -> None:
        self._pipeline = pipeline
        self._settings = settings
        self._batch_sizes = BatchSizeProbe(strict=settings.determinism == "strict")
        # What is kept in memory, and beside it what is only still in use.
        self._cache: OrderedDict[_Version, Lora] = OrderedDict()
        self._in_use: WeakValueDictionary[_Version, Lora] = WeakValueDictionary()
        self._lock = threading.Lock()  # of these two
        # Of the pass that is under way; None: no row has a LoRA.
        self.batch: LoraBatch | None = None
        self._loading_threads = ThreadPoolExecutor(
            2, "lora"
        )  # so that a large file does not hold all others up
        self._hooked: set[str] = set()  # layers
        self._reason = next(
            (f"with --{name}" for name in _EXCLUDING if getattr(settings, name) != "off"), None
        )
        self._possible = self._reason is None and hasattr(pipeline, "lora_state_dict")
        self.registry = self._open_registry()
        if self.registry.default is not None:
            try:
                self.load(((self.registry.default, 1.0),))
            except InvalidRequestError as error:
                raise ModelError(error.message) from None

    def _open_registry(self) -> LoraRegistry:
        settings = self._settings
        if not self._possible:
            if settings.lora or settings.lora_dir:
                why = self._reason or f"by {type(self._pipeline).__name__}"
                raise ConfigurationError(f"LoRAs are not served {why}.")
            return LoraRegistry()
        folder = self._pipeline.config.get("_name_or_path")
        return open_registry(settings, Path(folder) if folder else None)

    @property
    def capabilities(self) -> frozenset[Capability]:
        return frozenset({"loras"}) if self._possible else frozenset()

    def info_fields(self) -> dict[str, Any]:
        """The fields of a `ModelInfo` that tell of LoRAs."""
        return {
            "loras": tuple(sorted(self.registry.files)),
            "lora_folders": tuple(str(folder) for folder in self.registry.folders),
            "default_lora": self.registry.default,
            "max_loras": self._settings.max_loras if self._possible else 0,
        }

    def load_in_background(self, names_and_weights: LoraWeights) -> Future[Loras] | None:
        """Start to load the LoRAs of a request in a thread; those in memory are there at once. None: it has
        none.
        """
        if not names_and_weights:
            return None
        if not self._in_memory(names_and_weights):
            return self._loading_threads.submit(self.load, names_and_weights)
        ready: Future[Loras] = Future()
        ready.set_result(self.load(names_and_weights))
        return ready

    def _in_memory(self, names_and_weights: LoraWeights) -> bool:
        try:
            versions = [_version_of(name, self.registry.path_of(name)) for name, _ in names_and_weights]
        except (OSError, InvalidRequestError):  # told by whoever reads it
            return False
        with self._lock:
            return all(version in self._in_use for version in versions)

    @torch.inference_mode()
    def load(self, names_and_weights: LoraWeights) -> Loras:
        """The LoRAs of a request, from memory or their files; weight 0 is the base model.

        Raises:
            InvalidRequestError: a name is not offered, or its file is no LoRA for this model.
        """
        return tuple((self._read_one(name), weight) for name, weight in names_and_weights if weight != 0)

    def _read_one(self, name: str) -> Lora:
        path = self.registry.path_of(name)
        try:
            version = _version_of(name, path)
            with self._lock:
                lora = self._in_use.get(version)
            if lora is None:
                weights = read_weights(path, self._pipeline, self._settings.max_lora_mb * 1e6)
                lora = Lora({layer: self._pad_rank(one) for layer, one in weights.items()})
                logger.info("Loaded the LoRA %s: %d layers.", name, len(lora.layers))
        except OSError:
            raise InvalidRequestError(f"The LoRA '{name}' cannot be read.", param="loras") from None
        except IncompatibleLoraError as error:
            raise InvalidRequestError(f"The LoRA '{name}' {error}.", param="loras") from None
        self._keep(version, lora)
        return lora

    def _pad_rank(self, weights: LayerWeights) -> LayerWeights:
        """Zeros up to the rank at which products are computed together: neighbours of another rank then
        change no shape, and so no bits.
        """
        missing = self._settings.max_lora_rank - weights.rank
        if missing <= 0 or weights.down.dim() > 2 or weights.magnitude is not None:
            return weights
        return replace(
            weights,
            down=functional.pad(weights.down, (0, 0, 0, missing)),
            up=functional.pad(weights.up, (0, missing)),
        )

    def _hook(self, lora: Lora) -> None:
        """Hooks and not other forwards, because the engine replaces forwards of layers (layers.py)."""
        for name in lora.layers.keys() - self._hooked:
            component, _, inside = name.partition(".")
            layer = getattr(self._pipeline, component).get_submodule(inside)
            layer.register_forward_hook(partial(self._add, name))
            self._hooked.add(name)
        lora.hooked = True

    def _add(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if (rows := self.batch) is not None:
            rows.add(layer, name, inputs[0], output)

    def _keep(self, version: _Version, lora: Lora) -> None:
        with self._lock:
            self._in_use[version] = self._cache[version] = lora
            self._cache.move_to_end(version)
            while sum(one.nbytes for one in self._cache.values()) > self._settings.lora_cache_mb * 1e6:
                self._cache.popitem(last=False)

    @contextmanager
    def _applied(self, loras: Sequence[Loras]) -> Iterator[None]:
        # Here and not where a LoRA is loaded: a hook must not come while another thread runs the layer.
        for lora, _ in itertools.chain(*loras):
            if not lora.hooked:
                self._hook(lora)
        self.batch = LoraBatch(loras, self._batch_sizes)
        try:
            yield
        finally:
            self.batch = None


@contextmanager
def lora_context(lora_manager: LoraManager | None, loras: Sequence[Loras]) -> Iterator[None]:
    """Apply to each row of the batch inside its own LoRAs.

    Args:
        lora_manager: that loaded them; None: the family has no LoRAs.
    """
    if lora_manager is None or not any(loras):
        yield
        return
    with lora_manager._applied(loras):
        yield


def text_encoder_loras(loras: Loras) -> Loras:
    """Those of a request's LoRAs that change how its prompt is read."""
    return tuple((lora, weight) for lora, weight in loras if lora.changes_text_encoder)


def prompt_cache_key(loras: Loras) -> Hashable:
    """What tells apart texts that were read with other LoRAs."""
    return tuple((lora.number, weight) for lora, weight in loras)
