"""Img2img: start from the noised latents of an input image, part of the way through the schedule."""

from __future__ import annotations

from typing import Any

import torch

from hypergen.conditioning.image_tensors import to_image
from hypergen.conditioning.latent_space import InitialLatents, LatentSpace
from hypergen.denoising.linear_steps import add_noise
from hypergen.images.geometry import resize_to_generation_size
from hypergen.request import GenerationRequest, InputImage


def get_start_step(request: GenerationRequest, scheduler: Any) -> int:
    """The first of the request's steps to run; equal to the number of steps if `strength` leaves none.

    If `strength` leaves a fraction of a step, diffusers' flow matching pipelines run it, the others skip it.
    """
    steps = request.num_inference_steps
    remaining = min(steps * request.strength, steps)
    return int(steps - remaining) if hasattr(scheduler, "scale_noise") else steps - int(remaining)


def set_start_step(scheduler: Any, steps: int) -> int:
    """Skip the first steps of a scheduler; returns its step index, twice `steps` for second order."""
    index = steps * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(index)
    return index


def prepare_latents(
    request: GenerationRequest,
    image: InputImage,
    scheduler: Any,
    space: LatentSpace,
    size: tuple[int, int],
    generator: torch.Generator,
) -> InitialLatents:
    """Encode the input image and add the noise of the first step that `request.strength` leaves.

    Random numbers are used in the order of diffusers' pipelines: the VAE sample, then the noise.
    """
    index = set_start_step(scheduler, get_start_step(request, scheduler))
    image_latents = space.encode(to_image(resize_to_generation_size(image, size)), generator)
    noise = space.noise(*size, generator)
    return InitialLatents(add_noise(scheduler, image_latents, noise, scheduler.timesteps[index]), index)
