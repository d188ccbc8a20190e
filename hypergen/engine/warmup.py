"""Warming up: the picture that shows that a model draws, before anybody asks."""

from __future__ import annotations

from collections import deque

from hypergen.denoising.denoising_state import DenoisingState
from hypergen.engine.batch_invariance.shape_profiles import ShapeProfiles
from hypergen.model_info import ModelInfo
from hypergen.models.cfg import denoise
from hypergen.models.family import Family
from hypergen.request import GenerationRequest


def generate_once(family: Family, description: ModelInfo, shapes: ShapeProfiles) -> DenoisingState:
    """Probe the default size and draw a picture of it, up to its last step."""
    request = warm_up_request(description)
    state = family.prepare(request, 0, family.encode_prompts(request))
    deque(shapes.probe_minimum(state), maxlen=0)
    while state.remaining_steps:
        state.advance(denoise(family, [state])[0])
    return state


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
