"""Loads a model for the model manager and warms it up."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch

from hypergen.engine.batch_invariance.bucket_store import BucketStore
from hypergen.engine.engine import Engine
from hypergen.engine.image_writer import ImageWriter
from hypergen.engine.loading_progress import log_progress
from hypergen.engine.model_slot import LoadedModel
from hypergen.engine.pipeline_engine import PipelineEngine
from hypergen.engine.postprocess import Report
from hypergen.errors import HyperGenError, SettingError
from hypergen.events import ForwardPass
from hypergen.models import loading
from hypergen.models.diffusers_pipeline import DiffusersPipeline
from hypergen.models.family import Family
from hypergen.served_model import ServedModel

logger = logging.getLogger(__name__)

# Settings by which forward passes get other bits or costs.
_SETTINGS_OF_BITS = ("attention", "compile", "cuda_graphs", "max_batch_size", "offload", "quantization")


class Loader:
    """Loads models and generates one image with each.

    Args:
        alone: see `loading.load_any`.
        state_folder: for what outlives the process; None keeps nothing.
        on_forward: called after the forward passes of requests.

    Attributes:
        seconds: stage -> its duration, summed over all models.
    """

    def __init__(
        self,
        report: Report,
        *,
        alone: bool,
        state_folder: Path | None = None,
        on_forward: Callable[[ForwardPass], None] = lambda _: None,
    ) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._report = report
        self._alone = alone
        self._state_folder = state_folder
        self._on_forward = on_forward

    def __call__(self, model: ServedModel, between_steps: Callable[[], None]) -> LoadedModel:
        """See `ModelManager`.

        Raises:
            ConfigurationError: the certificate for images cannot sign.
            ModelError: the model cannot be loaded.
            SettingError: it cannot be loaded with its settings, or its attention backend failed.
            GenerationError: the warm-up image cannot be generated.
        """
        ImageWriter(model.id, model.settings)  # reports its faults before the weights are loaded
        started = time.monotonic()
        with log_progress(model.id, loading.expected_bytes(model.path, model.settings)):
            loaded = loading.load_any(
                model.path, model.settings, model.defaults, model.options, alone=self._alone
            )
        weights_s = time.monotonic() - started
        self.seconds["weights"] += weights_s
        logger.info(
            "Loaded %s in %.1f s: %.3g GB on %s.",
            model.id,
            weights_s,
            loading.weight_bytes(loaded.modules) / 1e9,
            loaded.device,
        )
        started = time.monotonic()
        if isinstance(loaded, DiffusersPipeline):
            engine = PipelineEngine(
                loaded, model.id, model.settings, self._report, between_steps, self._on_forward
            )
        else:
            buckets = self._buckets(model, loaded)
            engine = Engine(
                loaded, model.id, model.settings, self._report, buckets=buckets, on_forward=self._on_forward
            )
        try:
            engine.warm_up()
        except Exception as error:
            if model.settings.attention is None or isinstance(error, HyperGenError):
                raise
            logger.exception("The warm-up with attention %s failed.", model.settings.attention)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise SettingError(
                "attention", f"{model.settings.attention} failed in the warm-up: {reason[:300]}"
            ) from None
        self.seconds["warm-up"] += time.monotonic() - started
        # Offloaded networks are in main memory already; compiled code may have its own references to weights.
        is_movable = (
            loaded.device.type == "cuda" and model.settings.offload == model.settings.compile == "off"
        )
        movable = loaded.modules if is_movable else ()
        # After the warm-up: it reorders weights on a CPU.
        more = engine.more_networks if isinstance(engine, Engine) else ()
        size_bytes = loading.weight_bytes((*loaded.modules, *more))
        return LoadedModel(engine, loaded.model_info(model.id), size_bytes, movable)

    def _buckets(self, model: ServedModel, family: Family) -> BucketStore | None:
        """The row counts chosen in earlier runs, on an accelerator or for compiled shapes."""
        settings = model.settings
        chooses = family.device.type != "cpu" or settings.compile != "off"
        if not chooses or self._state_folder is None:
            return None
        key = {
            "model": model.tags[0] if model.tags else str(model.path),
            "dtype": str(family.denoiser.dtype),
            "device": torch.cuda.get_device_name() if family.device.type == "cuda" else family.device.type,
            "torch": torch.__version__,
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "diffusers": diffusers.__version__,
            **{name: str(getattr(settings, name)) for name in _SETTINGS_OF_BITS},
        }
        return BucketStore(self._state_folder / "row_buckets.json", key)
