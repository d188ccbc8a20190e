"""Warming up: the picture that shows that a model draws, before anybody asks."""

from __future__ import annotations

from collections import deque

from hypergen.denoising.denoising_state import Trajectory
from hypergen.engine.batch_invariance.shape_profiles import Shapes
from hypergen.model_info import ModelInfo
from hypergen.models.cfg import denoise
from hypergen.models.family import Family
from hypergen.request import GenerationRequest


def draw_once(family: Family, description: ModelInfo, shapes: Shapes) -> Trajectory:
    """Probe the default size and draw a picture of it, up to its last step."""
    request = warm_up_request(description)
    trajectory = family.prepare(request, 0, family.encode_prompts(request))
    deque(shapes.learn(trajectory), maxlen=0)
    while trajectory.remaining_steps:
        trajectory.advance(denoise(family, [trajectory])[0])
    return trajectory


def warm_up_request(description: ModelInfo) -> GenerationRequest:
    """Two steps at the model's own size and guidance."""
    defaults = description.defaults
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
