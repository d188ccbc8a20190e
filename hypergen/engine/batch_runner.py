"""Runs batches: the forward pass with guidance, and the scheduler steps, on a CPU or an accelerator."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext

from torch import Tensor

from hypergen.config import EngineSettings
from hypergen.denoising.denoising_state import DenoisingState, advance_each
from hypergen.engine.accelerator_step import AcceleratorStep
from hypergen.engine.batch_invariance.shape_profiles import ShapeProfiles
from hypergen.engine.forward_graphs import uses_graphs
from hypergen.engine.forward_timer import ForwardTimer
from hypergen.engine.request_errors import free_cached_memory, is_out_of_memory
from hypergen.engine.scheduler import batch_key
from hypergen.models.cfg import denoise
from hypergen.models.family import Family
from hypergen.models.memory import LeaveRoom

logger = logging.getLogger(__name__)


class BatchRunner:
    """Predicts and advances the images of a batch; belongs to the engine's thread.

    Args:
        shape_profiles: has the row counts of batches, and gets the cost of each forward pass.
        clock: seconds; not used on CUDA.
        free_memory: called when the device is out of memory, before another try.
        leave_room: see `PostProcessor`.
        on_forward: called with the images, rows and seconds of each forward pass.

    Attributes:
        forward_s: seconds of the latest measured forward pass.
        forwards, image_steps: forward passes so far, and the images in them.
    """

    def __init__(
        self,
        family: Family,
        settings: EngineSettings,
        shape_profiles: ShapeProfiles,
        clock: Callable[[], float],
        *,
        free_memory: Callable[[], None] = free_cached_memory,
        leave_room: LeaveRoom = nullcontext,
        on_forward: Callable[[int, int, float], None] = lambda *_: None,
    ) -> None:
        self._free_memory = free_memory
        self._leave_room = leave_room
        self.forward_s = 0.0
        self.forwards = 0
        self.image_steps = 0
        self._family = family
        self._shape_profiles = shape_profiles
        self._on_forward = on_forward
        self._timer = ForwardTimer(family.device, clock)
        self._accelerator = None
        if family.device.type != "cpu":
            self._accelerator = AcceleratorStep(family, graphs=uses_graphs(family, settings))

    def free_memory(self) -> None:
        """See `Engine.free_memory`."""
        if self._accelerator is not None:
            self._accelerator.free_memory()

    def clear_graphs(self) -> None:
        """Free the memory of CUDA graphs."""
        if self._accelerator is not None:
            self._accelerator.clear_graphs()

    def close(self) -> None:
        if self._accelerator is not None:
            self._accelerator.close()

    def predict(self, batch: list[DenoisingState]) -> Iterator[tuple[DenoisingState, Tensor | Exception]]:
        """The prediction of each image, by one forward pass; if that fails, by one for each image.

        So only the images that cannot run alone get an exception.
        """
        rows = sum(state.rows for state in batch)
        try:
            predictions = self._run_with_freed_memory(batch)
        except Exception as error:  # Isolate the failure: only the request that causes it fails.
            out_of_memory = is_out_of_memory(error)
            key = batch_key(batch[0]).shared
            row_count = self._shape_profiles.costs[key].padded(rows)
            if len(batch) == 1 and not (out_of_memory and row_count > rows):
                yield batch[0], error
                return
            ids = ", ".join(sorted({state.request.id for state in batch}))
            logger.warning(
                "The forward pass for a batch of %d images (requests %s) failed (%s); retrying each alone.",
                len(batch),
                ids,
                error,
            )
        else:
            yield from zip(batch, predictions, strict=True)
            return
        # Outside the handler: inside, the error's frames would keep the memory of the failed forward pass.
        if out_of_memory:
            self._free_memory()
            self._shape_profiles.limit_rows(key, row_count)
        # Not in halves: batch size 1 is the only one that is sure to be among the probed sizes.
        for state in batch:
            yield from self.predict([state])

    def _run_with_freed_memory(self, batch: list[DenoisingState]) -> list[Tensor]:
        """`run_forward`; if the device is out of memory, once more after what can be freed is freed."""
        try:
            return self.run_forward(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._free_memory()
        return self.run_forward(batch)

    def run_forward(self, batch: list[DenoisingState]) -> list[Tensor]:
        """One forward pass over a batch, measured for the cost curve of its shape.

        Returns:
            One prediction of shape (1, C, h, w) per image.
        """
        costs = self._shape_profiles.costs[batch_key(batch[0]).shared]
        rows = costs.padded(sum(state.rows for state in batch))

        def record(seconds: float) -> None:
            self.forward_s = seconds
            costs.record(rows, seconds)
            self._on_forward(images, rows, seconds)

        images = len(batch)
        with self._timer.measure(record), self._leave_room(batch[0].latents):
            if self._accelerator is not None:
                predictions = self._accelerator.predict(batch, rows)
            else:
                predictions = denoise(self._family, batch, rows)
        self.forwards += 1
        self.image_steps += images
        shared = len({state.request.id for state in batch}) > 1
        for state in batch:
            state.forwards += 1
            state.shared_forwards += shared
            state.batch_images += images
        return predictions

    def step_schedulers(
        self, pairs: list[tuple[DenoisingState, Tensor]]
    ) -> Iterator[tuple[DenoisingState, Exception | None]]:
        """Advance each image by its prediction; yields each with the exception of its step, or None."""
        if self._accelerator is not None:
            return self._accelerator.advance(pairs)
        return advance_each(pairs)
