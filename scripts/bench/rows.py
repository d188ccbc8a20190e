"""Forward passes by row count: how long they take, and whether a row has the same bits in each."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor

from hypergen.engine.batch_invariance.probe import synchronize
from hypergen.engine.batch_invariance.shape_profiles import ShapeProfiles
from hypergen.engine.forward_graphs import ForwardGraphs
from hypergen.engine.request_errors import free_cached_memory, is_out_of_memory
from hypergen.engine.scheduler import batch_key
from hypergen.events import Verdict
from hypergen.models.cfg import ForwardInputs, map_rows, random_rows
from hypergen.models.family import Family
from scripts.bench.jobs import Job
from scripts.bench.policies import request_for
from scripts.bench.work import GUIDANCE_SCALE

ROW_COUNTS = (1, 2, 4, 8, 16)
_FORWARDS = 5


@dataclass(frozen=True)
class RowCount:
    """Forward passes with one row count.

    Attributes:
        forward_s: seconds, on CUDA as a graph.
        eager_s: seconds without a graph; None on a CPU.
        images_per_s: images per second, of denoising alone; None: too few rows for a guided image.
        equal_alone, equal_in_bucket: whether each row has the bits that it has alone, and in a batch of the
            engine's bucket.
    """

    rows: int
    forward_s: float
    eager_s: float | None
    images_per_s: float | None
    equal_alone: bool
    equal_in_bucket: bool


@dataclass(frozen=True)
class Shape:
    """Forward passes at one size, with default settings.

    Attributes:
        size: for example "512x512".
        bucket: the row count that the engine pads an image alone to.
        verdict: of the engine's probe.
        row_counts: those of `ROW_COUNTS` that fit in memory.
    """

    size: str
    bucket: int
    verdict: Verdict
    row_counts: list[RowCount]


@torch.inference_mode()
def measure_rows(family: Family, shape_profiles: ShapeProfiles, side: int, steps: int) -> Shape:
    """Let the engine probe a size, then measure its forward passes with random rows.

    Args:
        side: height and width of the images, in pixels.
        steps: of an image, for the images per second.
    """
    request = request_for(Job(0, 0, steps, GUIDANCE_SCALE), side)
    state = family.prepare(request, 0, family.encode_prompts(request))
    deque(shape_profiles.probe_minimum(state), maxlen=0)
    shape_profiles.finish_probes()
    key = batch_key(state).shared
    bucket = shape_profiles.costs[key].padded(state.rows)
    inputs = random_rows(state, ROW_COUNTS[-1], torch.Generator("cpu").manual_seed(0))
    graphs = ForwardGraphs(family) if family.device.type == "cuda" else None
    eager = partial(family.forward, batch_key_extra=state.batch_key_extra)
    alone, in_bucket = _in_batches(eager, inputs, 1), _in_batches(eager, inputs, bucket)
    row_counts: list[RowCount] = []
    for count in ROW_COUNTS:
        batch = map_rows(inputs, itemgetter(slice(count)))
        forward = partial(graphs.forward, batch_key_extra=state.batch_key_extra) if graphs else eager
        try:
            output, seconds = _timed(forward, batch)
            eager_s = _timed(eager, batch)[1] if graphs else None
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            free_cached_memory()
            break
        images_per_s = count / state.rows / steps / seconds if count >= state.rows else None
        equal = [torch.equal(output, rows[:count]) for rows in (alone, in_bucket)]
        row_counts.append(RowCount(count, seconds, eager_s, images_per_s, *equal))
    return Shape(f"{side}x{side}", bucket, shape_profiles.probes[key].verdict, row_counts)


def _in_batches(forward: Callable[..., Tensor], inputs: ForwardInputs, size: int) -> Tensor:
    """The outputs of all rows, in batches of `size`."""
    starts = range(0, len(inputs[0]), size)
    return torch.cat([forward(*map_rows(inputs, itemgetter(slice(i, i + size)))) for i in starts])


def _timed(forward: Callable[..., Tensor], batch: ForwardInputs) -> tuple[Tensor, float]:
    """An output, and the mean seconds of several forward passes."""
    for _ in range(2):  # the first prepares kernels, the second captures a graph
        synchronize(forward(*batch))
    if batch[0].is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        output = _repeat(forward, batch)
        end.record()
        end.synchronize()
        return output, start.elapsed_time(end) / 1000 / _FORWARDS
    started = time.monotonic()
    output = _repeat(forward, batch)
    return output, (time.monotonic() - started) / _FORWARDS


def _repeat(forward: Callable[..., Tensor], batch: ForwardInputs) -> Tensor:
    for _ in range(_FORWARDS - 1):
        forward(*batch)
    return forward(*batch)
