"""Small Stable Diffusion models with random weights: real modules, real files, nothing downloaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from diffusers import DDIMScheduler

from hypergen.bench.models import RANDOM_MODELS

Prediction = Literal["epsilon", "v_prediction"]


def save_sd(folder: Path, prediction_type: Prediction = "epsilon", sample_size: int = 16) -> Path:
    """A Stable Diffusion pipeline of about 1.5 million weights, with the scheduler of SD 1.x or 2.x."""
    pipeline = replace(RANDOM_MODELS["tiny"], latent_side=sample_size).pipeline()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline.register_modules(scheduler=scheduler)
    pipeline.save_pretrained(folder)
    return folder
