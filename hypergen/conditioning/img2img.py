"""Picture to picture: an image that begins from a picture with noise added, part of the way down."""

from __future__ import annotations

from typing import Any

import torch

from hypergen.conditioning.latents import Beginning, LatentSpace
from hypergen.conditioning.pictures import fit, to_image
from hypergen.generation import GenerationRequest, Picture


def first_step(request: GenerationRequest) -> int:
    """The first of the request's steps that is taken; all of them are left out for too small a strength."""
    steps = request.num_inference_steps
    return steps - min(int(steps * request.strength), steps)


def skip_steps(scheduler: Any, steps: int) -> int:
    """Let a scheduler begin after so many steps; returns its index there, twice as far for second order."""
    index = steps * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(index)
    return index


def begin(
    request: GenerationRequest,
    picture: Picture,
    scheduler: Any,
    space: LatentSpace,
    size: tuple[int, int],
    generator: torch.Generator,
) -> Beginning:
    """Encode the picture and add the noise of the first step that `request.strength` leaves.

    Draws in the order of diffusers' StableDiffusionImg2ImgPipeline: the sample, then the noise.
    """
    index = skip_steps(scheduler, first_step(request))
    image_latents = space.encode(to_image(fit(picture, *size)), generator)
    noise = space.noise(*size, generator)
    timestep = scheduler.timesteps[index].reshape(1)
    return Beginning(scheduler.add_noise(image_latents, noise, timestep), index)
