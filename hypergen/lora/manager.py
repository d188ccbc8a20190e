"""LoRA manager: loads the LoRAs of requests and applies them to the rows of forward passes.

Each family with LoRAs has one `LoraManager`. Forward passes of the pipeline's modules run in `lora_context`.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from cachetools import LRUCache
from torch import Tensor, nn
from torch.nn import functional

from hypergen import log_setup
from hypergen.cache_lookups import count_lookup
from hypergen.config import EngineSettings
from hypergen.errors import InvalidRequestError, SettingError
from hypergen.lora.accelerator_batch import AcceleratorLoraBatch, RowLoras
from hypergen.lora.batched_lora import BatchSizeProbe, LoraBatch, Loras
from hypergen.lora.factors import IncompatibleLoraError
from hypergen.lora.files import families_of
from hypergen.lora.layer_names import LayerNames
from hypergen.lora.slots import LoraSlots, joined, pack
from hypergen.lora.textual_inversion import embedding_widths
from hypergen.lora.weights import LayerWeights, Lora, in_text_encoder, read_lora
from hypergen.model_info import Capability
from hypergen.model_store.lora_files import LoraRegistry, open_registry, peft_config_file

logger = logging.getLogger(__name__)

# LoRA names and weights of a request.
LoraWeights = tuple[tuple[str, float], ...]
# Name, and size and modification time of its files: a changed file is loaded again.
_Version = tuple[str | int, ...]


def _version_of(name: str, path: Path) -> _Version:
    files = [os.stat(file) for file in (path, peft_config_file(path)) if file]
    return name, *(value for file in files for value in (file.st_size, file.st_mtime_ns))


class LoraManager:
    """Loads LoRAs by name, in any thread, and applies them to forward passes, in the engine's thread.

    Args:
        pipeline: of diffusers; forward hooks on its layers do nothing in batches without a LoRA.

    Raises:
        SettingError: a LoRA file is missing, the server's default LoRA does not match this model, or LoRAs
            cannot be combined with another setting.
    """

    def __init__(self, pipeline: Any, settings: EngineSettings) -> None:
        self._pipeline = pipeline
        self._settings = settings
        self._batch_sizes = BatchSizeProbe(strict=settings.determinism == "strict")
        # Recently used LoRAs, and all LoRAs that are still referenced.
        cache_bytes = settings.lora_cache_mb * 1e6
        self._cache: LRUCache[_Version, Lora] = LRUCache(cache_bytes, lambda lora: lora.nbytes)
        self.slots = LoraSlots(cache_bytes)  # of CUDA graphs
        self._in_use: WeakValueDictionary[_Version, Lora] = WeakValueDictionary()
        self._lock = threading.Lock()  # guards both
        # Of the current forward pass; None: no row has a LoRA.
        self.batch: LoraBatch | AcceleratorLoraBatch | None = None
        # Of the latest batch: they change only when images join or leave.
        self._row_loras: tuple[Hashable, RowLoras] | None = None
        self._zeros: dict[Hashable, Tensor] = {}  # factors of the rows without a LoRA, by shape and dtype
        self._loading_threads = _loading_threads()
        self._hooked: set[str] = set()  # layer names
        # Offloaded weights are elsewhere when a LoRA is loaded.
        self._reason = None if settings.offload == "off" else "with --offload"
        self._possible = self._reason is None and hasattr(pipeline, "lora_state_dict")
        self.registry = self._open_registry()
        if self.registry.default is not None:
            try:
                self.load(((self.registry.default, 1.0),))
            except InvalidRequestError as error:
                raise SettingError("lora", error.message) from None

    def _open_registry(self) -> LoraRegistry:
        settings = self._settings
        if not self._possible:
            if settings.lora or settings.lora_dir:
                reason = self._reason or f"by {type(self._pipeline).__name__}"
                raise SettingError("lora" if settings.lora else "lora_dir", f"is not supported {reason}.")
            return LoraRegistry()
        folder = self._pipeline.config.get("_name_or_path")
        return open_registry(settings, Path(folder) if folder else None)

    @property
    def capabilities(self) -> frozenset[Capability]:
        return frozenset({"loras"}) if self._possible else frozenset()

    @property
    def has_loras(self) -> bool:
        """Whether a request can have a LoRA; folders may get some later."""
        return bool(self.registry.files or self.registry.folders)

    def info_fields(self) -> dict[str, Any]:
        """The LoRA fields of `ModelInfo`."""
        return {
            "loras": tuple(sorted(self.registry.files)),
            "lora_folders": tuple(str(folder) for folder in self.registry.folders),
            "default_lora": self.registry.default,
            "max_loras": self._settings.max_loras if self._possible else 0,
        }

    @property
    def count_in_memory(self) -> int:
        with self._lock:
            return len(self._in_use)

    def load_in_background(self, names_and_weights: LoraWeights) -> Future[Loras] | None:
        """Load the LoRAs of a request in a thread, or at once if they are in memory; None: it has none."""
        if not names_and_weights:
            return None
        if not self._in_memory(names_and_weights):
            return self._loading_threads.submit(self.load, names_and_weights)
        ready: Future[Loras] = Future()
        ready.set_result(self.load(names_and_weights))
        return ready

    def clear(self) -> None:
        """Forget the loaded LoRAs, also those that are loaded now for cancelled requests."""
        self._loading_threads.shutdown()
        self._loading_threads = _loading_threads()
        self.slots.clear()
        self._row_loras = None
        self._zeros.clear()
        with self._lock:
            self._cache.clear()

    def _in_memory(self, names_and_weights: LoraWeights) -> bool:
        try:
            versions = [_version_of(name, self.registry.path_of(name)) for name, _ in names_and_weights]
        except (OSError, InvalidRequestError):  # `load` raises it again
            return False
        with self._lock:
            return all(version in self._in_use for version in versions)

    @torch.inference_mode()
    def load(self, names_and_weights: LoraWeights) -> Loras:
        """The LoRAs of a request, from memory or from their files, without those of weight 0.

        Raises:
            InvalidRequestError: unknown name, or the file is not a LoRA for this model.
        """
        return tuple((self._load_one(name), weight) for name, weight in names_and_weights if weight != 0)

    def _load_one(self, name: str) -> Lora:
        path = self.registry.path_of(name)
        try:
            version = _version_of(name, path)
            with self._lock:
                lora = self._in_use.get(version)
            count_lookup("lora", found=lora is not None)
            if lora is None:
                lora = self._read(path, name)
                logger.info("Loaded the LoRA %s: %d layers.", name, len(lora.layers) + len(lora.norms))
        except OSError:
            raise InvalidRequestError(f"The LoRA '{name}' cannot be read.", param="loras") from None
        except IncompatibleLoraError as error:
            raise InvalidRequestError(f"The LoRA '{name}' {error}.", param="loras") from None
        return self._keep(version, lora)

    def _read(self, path: Path, name: str) -> Lora:
        families, widths = families_of(self._pipeline), embedding_widths(self._pipeline)
        content = read_lora(path, self._layer_names, families, widths, self._settings.max_lora_mb * 1e6)
        if self._pipeline.device.type == "cpu":
            layers = {layer: self._pad_rank(factors) for layer, factors in content.layers.items()}
        else:
            rank = self._settings.max_lora_rank
            layers = {
                layer: factors if in_text_encoder(layer) else joined(factors, rank)
                for layer, factors in content.layers.items()
            }
        return pack(replace(content, layers=layers), name)

    @functools.cached_property
    def _layer_names(self) -> LayerNames:
        return LayerNames(self._pipeline)

    def _pad_rank(self, weights: LayerWeights) -> LayerWeights:
        """Pad to the maximum rank with zeros: LoRAs of other ranks in the batch then change no shape."""
        missing = self._settings.max_lora_rank - weights.rank
        if missing <= 0 or weights.down.dim() > 2 or not weights.is_plain:
            return weights
        return replace(
            weights,
            down=functional.pad(weights.down, (0, 0, 0, missing)),
            up=functional.pad(weights.up, (0, missing)),
        )

    def _hook(self, lora: Lora) -> None:
        """Register forward hooks; not new `forward` methods, because batch invariance replaces those."""
        for name in {*lora.layers, *lora.norms} - self._hooked:
            component, _, inside = name.partition(".")
            layer = getattr(self._pipeline, component).get_submodule(inside)
            layer.register_forward_hook(partial(self._add, name))
            self._hooked.add(name)
        lora.hooked = True

    def _add(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self.batch is not None:
            self.batch.add(layer, name, inputs[0], output)

    def _keep(self, version: _Version, lora: Lora) -> Lora:
        """The LoRA itself, or the one that another thread has loaded meanwhile."""
        with self._lock:
            lora = self._in_use.setdefault(version, lora)
            with suppress(ValueError):  # larger than the cache
                self._cache[version] = lora
        return lora

    def make_batch(self, rows: Sequence[Loras]) -> LoraBatch | AcceleratorLoraBatch | None:
        """The LoRAs of the rows of a batch; None: no row has one."""
        if not any(rows):
            return None
        device: torch.device = self._pipeline.device
        if device.type == "cpu":
            return LoraBatch(rows, self._batch_sizes)
        key = tuple(loras_key(own) for own in rows)
        known = None if self._row_loras is None or self._row_loras[0] != key else self._row_loras[1]
        batch = AcceleratorLoraBatch(rows, device, self._zeros, known)
        self._row_loras = key, batch.row_loras
        return batch

    @contextmanager
    def applied(self, batch: LoraBatch | AcceleratorLoraBatch | None) -> Iterator[None]:
        """Apply the LoRAs of a batch, if it has any, to the forward passes inside."""
        # Not in `load`, which runs in other threads: a hook must not be added while its layer runs.
        for lora in batch.loras if batch is not None else ():
            if not lora.hooked:
                self._hook(lora)
        self.batch = batch
        try:
            yield
        finally:
            self.batch = None


def _loading_threads() -> ThreadPoolExecutor:
    """Two, so that a large file does not block the next."""
    model = log_setup.current_model
    return ThreadPoolExecutor(2, "lora", initializer=model.set, initargs=(model.get(),))


@contextmanager
def lora_context(lora_manager: LoraManager | None, loras: Sequence[Loras]) -> Iterator[None]:
    """Apply each row's LoRAs to the forward passes inside.

    Args:
        lora_manager: the manager that loaded them; None: the family has no LoRAs.
        loras: of each row.
    """
    if lora_manager is None:
        yield
        return
    with lora_manager.applied(lora_manager.make_batch(loras)):
        yield


def text_encoder_loras(loras: Loras) -> Loras:
    """The LoRAs that change the text encoder, and so the prompt embeddings."""
    return tuple((lora, weight) for lora, weight in loras if lora.changes_text_encoder)


def denoiser_loras(loras: Loras) -> Loras:
    """The LoRAs that change the denoiser."""
    return tuple((lora, weight) for lora, weight in loras if lora.changes_denoiser)


def loras_key(loras: Loras) -> Hashable:
    """The LoRAs of a row with their weights, for the keys of caches."""
    return tuple((lora.number, weight) for lora, weight in loras)
