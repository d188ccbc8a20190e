"""Picture to picture: an image that begins from a picture with noise added, part of the way down."""

from __future__ import annotations

from typing import Any

import torch

from hypergen.conditioning.image_tensors import to_image
from hypergen.conditioning.latent_space import InitialLatents, LatentSpace, add_noise
from hypergen.images.geometry import resize_to_generation_size
from hypergen.request import GenerationRequest, InputImage


def get_start_step(request: GenerationRequest, scheduler: Any) -> int:
    """The first of the request's steps that is taken; all of them are left out for too small a strength.

    Of a step that strength leaves in part, diffusers' pipelines for flow matching take the whole, the others
    nothing.
    """
    steps = request.num_inference_steps
    left = min(steps * request.strength, steps)
    return int(steps - left) if hasattr(scheduler, "scale_noise") else steps - int(left)


def set_start_step(scheduler: Any, steps: int) -> int:
    """Let a scheduler begin after so many steps; returns its index there, twice as far for second order."""
    index = steps * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(index)
    return index


def prepare_latents(
    request: GenerationRequest,
    picture: InputImage,
    scheduler: Any,
    space: LatentSpace,
    size: tuple[int, int],
    generator: torch.Generator,
) -> InitialLatents:
    """Encode the picture and add the noise of the first step that `request.strength` leaves.

    Draws in the order of diffusers' pipelines: the sample, then the noise.
    """
    index = set_start_step(scheduler, get_start_step(request, scheduler))
    image_latents = space.encode(to_image(resize_to_generation_size(picture, size)), generator)
    noise = space.noise(*size, generator)
    return InitialLatents(add_noise(scheduler, image_latents, noise, scheduler.timesteps[index]), index)
