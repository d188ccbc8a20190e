"""Loads a model for the model manager and warms it up."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

from hypergen.engine.engine import Engine
from hypergen.engine.model_manager import LoadedModel
from hypergen.engine.pipeline_engine import PipelineEngine
from hypergen.engine.postprocess import Report
from hypergen.models import loading
from hypergen.models.diffusers_pipeline import DiffusersPipeline
from hypergen.served_model import ServedModel


class Loader:
    """Loads models and generates one image with each.

    Args:
        alone: see `loading.load_any`.

    Attributes:
        seconds: stage -> its duration, summed over all models.
    """

    def __init__(self, report: Report, *, alone: bool) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._report = report
        self._alone = alone

    def __call__(self, model: ServedModel, between_steps: Callable[[], None]) -> LoadedModel:
        """See `ModelManager`.

        Raises:
            ModelError: the model cannot be loaded.
            GenerationError: the warm-up image cannot be generated.
        """
        started = time.monotonic()
        loaded = loading.load_any(model.path, model.settings, model.defaults, alone=self._alone)
        size_bytes = loading.weight_bytes(loaded)
        self.seconds["weights"] += time.monotonic() - started
        started = time.monotonic()
        if isinstance(loaded, DiffusersPipeline):
            engine = PipelineEngine(loaded, model.id, model.settings, self._report, between_steps)
        else:
            engine = Engine(loaded, model.id, model.settings, self._report)
        engine.warm_up()
        self.seconds["warm-up"] += time.monotonic() - started
        return LoadedModel(engine, loaded.model_info(model.id), size_bytes)
