"""What it costs to choose the images of the next step, part of python -m scripts.bench --cpu."""

from __future__ import annotations

import time
from statistics import median

import torch
from diffusers import DDIMScheduler

from hypergen.denoising.denoising_state import DenoisingState, ModelInputs
from hypergen.engine.scheduler import CostCurve, RunningImages, batch_key
from scripts.bench.gates import Gate
from tests.support.sync_engine import make_request

IMAGES = 1000
_LIMIT_MS = 0.2
_CALLS = 200


def gate(images: int = IMAGES) -> Gate:
    """The median milliseconds of `next_batch` with so many waiting images of one size, in CPU time."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(20)
    inputs = ModelInputs(torch.zeros(1, 77, 8))
    waiting = RunningImages(
        DenoisingState(
            request=make_request(seed=seed),
            index=0,
            latents=torch.zeros(1, 4, 8, 8),
            positive=inputs,
            negative=inputs,
            guidance_scale=5.0,
            prompt_tokens=5,
            generator=torch.Generator(),
            scheduler=scheduler,
            is_stochastic=False,
        )
        for seed in range(images)
    )
    curve = CostCurve(16, seconds={1: 1.0, 2: 1.0, 4: 1.2, 8: 1.5, 16: 2.2})
    costs = {batch_key(state).shared: curve for state in waiting}
    milliseconds: list[float] = []
    for _ in range(_CALLS):
        started = time.thread_time()
        waiting.next_batch(costs, 8, 0.2, time.monotonic())
        milliseconds.append(1000 * (time.thread_time() - started))
    what = f"choosing a batch of {images:,} waiting images, ms of CPU time"
    return Gate(what, median(milliseconds), _LIMIT_MS, at_most=True)
