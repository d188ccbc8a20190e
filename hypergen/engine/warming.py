"""Warming up: the request that shows that a model draws, before anybody asks."""

from __future__ import annotations

from hypergen.generation import GenerationRequest, ModelDescription


def warm_up_request(description: ModelDescription) -> GenerationRequest:
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
