"""Inpainting: what a mask leaves black is put back in latent space after every step.

Kept pixels are put over the finished picture once more (`images/encoding.py`): the decoder changes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hypergen.conditioning.image_tensors import to_image, to_mask
from hypergen.conditioning.img2img import first_step, skip_steps
from hypergen.conditioning.latent_space import Beginning, LatentSpace, at_the_start, with_noise
from hypergen.denoising.denoising_state import Trajectory
from hypergen.images.geometry import resize_to_generation_size
from hypergen.request import GenerationRequest


@dataclass(frozen=True)
class KeptRegion:
    """Puts the known part of an image back, at the noise of the step that comes next.

    Attributes:
        mask: 1 where the image is drawn, 0 where it is kept, shape (1, 1, h, w).
        image_latents: of the picture that was sent, shape (1, C, h, w).
        noise: that the image began with, in the same shape.
    """

    mask: Tensor
    image_latents: Tensor
    noise: Tensor

    def __call__(self, trajectory: Trajectory) -> Tensor:
        kept = self.image_latents
        if trajectory.remaining_steps:
            kept = with_noise(trajectory.scheduler, kept, self.noise, trajectory.timestep)
        return (1 - self.mask) * kept + self.mask * trajectory.latents


def begin(
    request: GenerationRequest,
    scheduler: Any,
    space: LatentSpace,
    size: tuple[int, int],
    generator: torch.Generator,
    *,
    reads_mask: bool,
) -> Beginning:
    """Begin an image of which a part is kept, as diffusers' StableDiffusionInpaintPipeline does.

    Without a mask everything is drawn; without a picture, at full strength, as if over grey.

    Args:
        reads_mask: the denoiser was trained for inpainting: it reads the mask and what is kept as 1 + C more
            channels, and nothing has to be put back.
    """
    width, height = size
    strength = request.strength if request.image is not None else 1.0
    index = skip_steps(scheduler, first_step(request, scheduler) if request.image is not None else 0)
    image = torch.zeros(1, 3, height, width)
    if request.image is not None:
        image = to_image(resize_to_generation_size(request.image, size))
    mask = torch.ones(1, 1, height, width)
    if request.mask is not None:
        mask = to_mask(resize_to_generation_size(request.mask, size))

    # Drawn in this order, and only then, by diffusers: the picture's sample, the noise, the sample of what
    # is kept.
    image_latents = space.encode(image, generator) if strength < 1 or not reads_mask else None
    noise = space.noise(*size, generator)
    latent_mask = functional.interpolate(mask, size=noise.shape[-2:]).to(noise)
    if image_latents is None or strength == 1:
        latents = at_the_start(scheduler, noise)
    else:
        latents = with_noise(scheduler, image_latents, noise, scheduler.timesteps[index])
    if reads_mask or image_latents is None:
        masked_image_latents = space.encode(image * (mask < 0.5), generator)
        return Beginning(latents, index, mask=latent_mask, masked_image_latents=masked_image_latents)
    # diffusers encodes what is kept here too, and does not use it; samplers that draw noise go on from there.
    space.noise(*size, generator)
    return Beginning(latents, index, after_step=KeptRegion(latent_mask, image_latents, noise))
