"""The warm-up: an image that tests a model before the first request."""

from __future__ import annotations

import torch

from hypergen.model_info import ModelInfo
from hypergen.models.family import Family
from hypergen.request import GenerationRequest


@torch.inference_mode()
def rows_per_image(family: Family) -> int:
    """Rows of an image with default parameters: 2 with guidance, else 1, as for FLUX."""
    request = warm_up_request(family.model_info(""))
    return family.prepare(request, 0, family.encode_prompts(request)).rows


def warm_up_request(model_info: ModelInfo) -> GenerationRequest:
    """Two steps with the model's default size and guidance."""
    defaults = model_info.defaults
    return GenerationRequest(
        id="warm-up",
        prompt="",
        negative_prompt=None,
        width=defaults.width,
        height=defaults.height,
        num_inference_steps=2,
        guidance_scale=defaults.guidance_scale,
        seed=0,
        seed_given=False,
    )
