"""The warm-up: an image that tests a model before the first request."""

from __future__ import annotations

from collections import deque

from hypergen.denoising.denoising_state import DenoisingState
from hypergen.engine.batch_invariance.shape_profiles import ShapeProfiles
from hypergen.model_info import ModelInfo
from hypergen.models.cfg import denoise
from hypergen.models.family import Family
from hypergen.request import GenerationRequest


def generate_once(family: Family, model_info: ModelInfo, shape_profiles: ShapeProfiles) -> DenoisingState:
    """Probe the default size and generate the latents of an image of it."""
    request = warm_up_request(model_info)
    state = family.prepare(request, 0, family.encode_prompts(request))
    deque(shape_profiles.probe_minimum(state), maxlen=0)
    while state.remaining_steps:
        state.advance(denoise(family, [state])[0])
    return state


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
