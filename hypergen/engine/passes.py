"""Forward passes of an engine, measured and counted."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hypergen.denoising.denoising_state import Trajectory
from hypergen.engine.batch_invariance.probe import synchronize
from hypergen.engine.batch_invariance.shape_profiles import Shapes
from hypergen.engine.scheduler import group_key
from hypergen.models.cfg import denoise
from hypergen.models.family import Family


class Passes:
    """Runs a family's denoiser over batches; what each pass took goes into the cost curve of its shape.

    Attributes:
        seconds: of the latest pass.
        count: passes since the start.
        image_steps: images in those passes, summed.
    """

    def __init__(self, family: Family, shapes: Shapes, clock: Callable[[], float]) -> None:
        self.seconds = 0.0
        self.count = 0
        self.image_steps = 0
        self._family = family
        self._shapes = shapes
        self._clock = clock

    def predict(self, batch: list[Trajectory]) -> list[Tensor]:
        """One pass over images of one group: a prediction of shape (1, C, h, w) each."""
        started = self._clock()
        predictions = denoise(self._family.forward, batch)
        synchronize(predictions[0])
        self.seconds = self._clock() - started
        rows = sum(trajectory.rows for trajectory in batch)
        self._shapes.costs[group_key(batch[0]).shared].record(rows, self.seconds)
        self.count += 1
        self.image_steps += len(batch)
        shared = len({trajectory.request.id for trajectory in batch}) > 1
        for trajectory in batch:
            trajectory.shared_forwards += shared
        return predictions
