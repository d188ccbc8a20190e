"""The floating point operations of an image, and the shortest possible time for them on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hypergen.config import EngineSettings
from hypergen.engine.batch_invariance.probe import synchronize
from hypergen.model_families import PIPELINES
from hypergen.models.cfg import random_rows
from hypergen.models.family import Family
from scripts.bench.jobs import Job
from scripts.bench.policies import request_for

GUIDANCE_SCALE = 5.0
# A product of this many seconds is large enough: launching it takes far less.
_LARGE_S, _MAX_SIDE = 5e-3, 16384


@dataclass(frozen=True)
class Work:
    """The operations of one image with guidance.

    Attributes:
        peak_flops: floating point operations per second of a large matrix product on this device.
        rows: batch rows of one image.
        forward_flops, decode_flops: operations of one row of the denoiser and of decoding one image.
    """

    peak_flops: float
    rows: int
    forward_flops: float
    decode_flops: float

    def floor_s(self, steps: int) -> float:
        """The shortest possible seconds for an image at this precision, without prompt encoding."""
        return (self.rows * steps * self.forward_flops + self.decode_flops) / self.peak_flops


def family_of(pipeline: Any, side: int, settings: EngineSettings) -> Family:
    """The family of a pipeline, with `side` x `side` pixels as its default size."""
    model_card = {"defaults": {"width": side, "height": side}}
    return PIPELINES[type(pipeline).__name__].import_class()(pipeline, model_card, settings)


def work_of(family: Family, side: int) -> Work:
    """Count the operations of an image and measure the peak of its device."""
    weight = next(family.denoiser.parameters())
    return Work(_peak_flops(weight.device, weight.dtype), *operations_of(family, side))


@torch.inference_mode()
def _peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The peak of matrix products, which are large enough for this device."""
    side, peak = 512, 0.0
    while True:
        side *= 2
        matrix = torch.randn(side, side, device=device, dtype=dtype)
        seconds = min(_timed(lambda matrix=matrix: matrix @ matrix) for _ in range(8))
        peak = max(peak, 2 * side**3 / seconds)
        if seconds > _LARGE_S or side == _MAX_SIDE:
            return peak


@torch.inference_mode()
def operations_of(family: Family, side: int) -> tuple[int, int, int]:
    """Batch rows of an image with guidance, and the operations of one denoiser row and of the decoder.

    The family may be on the meta device, where nothing is computed.
    """
    request = request_for(Job(0, 0, 2, GUIDANCE_SCALE), side)
    state = family.prepare(request, 0, family.encode_prompts(request))
    inputs = random_rows(state, 1, torch.Generator("cpu").manual_seed(0))
    forward_flops = _flops(lambda: family.forward(*inputs, batch_key_extra=state.batch_key_extra))
    return state.rows, forward_flops, _flops(lambda: family.decode(state))


def _flops(call: Callable[[], object]) -> int:
    # Attention as matrix products: torch does not count the operations of the CPU's own kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _timed(call: Callable[[], torch.Tensor]) -> float:
    started = time.monotonic()
    synchronize(call())
    return time.monotonic() - started
