"""Inpainting: the kept region (black in the mask) is restored in latent space after every step.

The VAE changes kept pixels too, so `images/encoding.py` restores them once more in the decoded image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hypergen.conditioning.image_tensors import to_image, to_mask
from hypergen.conditioning.img2img import get_start_step, set_start_step
from hypergen.conditioning.latent_space import InitialLatents, LatentSpace, scale_initial_noise
from hypergen.denoising.denoising_state import DenoisingState
from hypergen.denoising.linear_steps import add_noise
from hypergen.images.geometry import resize_to_generation_size
from hypergen.request import GenerationRequest


@dataclass(frozen=True)
class InpaintModel:
    """How a denoiser that was trained for inpainting takes the mask, next to the latents of the kept region.

    Attributes:
        mask_pixels_as_channels: all pixels of the mask as channels, as FLUX.1 Fill; otherwise one value per
            latent pixel.
        samples_unused_image: diffusers samples latents of the input image at full strength, too, which
            advances the generator.
    """

    mask_pixels_as_channels: bool = False
    samples_unused_image: bool = False


@dataclass(frozen=True)
class MaskBlend:
    """Restores the kept region after a step, with the noise of the next step added.

    Attributes:
        mask: 1 in the region to generate, 0 in the kept region, shape (1, 1, h, w).
        image_latents: of the input image, shape (1, C, h, w).
        noise: the initial noise, in the same shape.
    """

    mask: Tensor
    image_latents: Tensor
    noise: Tensor

    def __call__(self, state: DenoisingState) -> Tensor:
        kept = self.image_latents
        if state.remaining_steps and state.linear is not None:
            clean, noise = state.linear.step_at(state.step_index).noised
            kept = clean * kept + noise * self.noise
        elif state.remaining_steps:
            kept = add_noise(state.scheduler, kept, self.noise, state.timestep)
        return (1 - self.mask) * kept + self.mask * state.latents


def prepare_latents(
    request: GenerationRequest,
    scheduler: Any,
    space: LatentSpace,
    size: tuple[int, int],
    generator: torch.Generator,
    *,
    model: InpaintModel | None,
) -> InitialLatents:
    """Prepare latents and mask as diffusers' StableDiffusionInpaintPipeline and FluxFillPipeline do.

    Without a mask the whole image is generated; without an input image, from grey at full strength.

    Args:
        model: of a denoiser that was trained for inpainting, so that nothing is restored after a step.
    """
    width, height = size
    strength = request.strength if request.image is not None else 1.0
    index = set_start_step(scheduler, get_start_step(request, scheduler) if request.image is not None else 0)
    image = torch.zeros(1, 3, height, width)
    if request.image is not None:
        image = to_image(resize_to_generation_size(request.image, size))
    mask = torch.ones(1, 1, height, width)
    if request.mask is not None:
        mask = to_mask(resize_to_generation_size(request.mask, size))

    # diffusers samples in this order: the image's latents, the noise, the latents of the kept region.
    is_sampled = model is None or strength < 1 or model.samples_unused_image
    image_latents = space.encode(image, generator) if is_sampled else None
    noise = space.noise(*size, generator)
    if model is not None and model.mask_pixels_as_channels:
        latent_mask = functional.pixel_unshuffle(mask, mask.shape[-1] // noise.shape[-1]).to(noise)
    else:
        latent_mask = functional.interpolate(mask, size=noise.shape[-2:]).to(noise)
    if image_latents is None or strength == 1:
        latents = scale_initial_noise(scheduler, noise)
    else:
        latents = add_noise(scheduler, image_latents, noise, scheduler.timesteps[index])
    if model is not None or image_latents is None:
        masked_image_latents = space.encode(image * (mask < 0.5), generator)
        return InitialLatents(latents, index, mask=latent_mask, masked_image_latents=masked_image_latents)
    # diffusers also samples the unused kept region here, which advances the generator for later steps.
    space.noise(*size, generator)
    return InitialLatents(latents, index, after_step=MaskBlend(latent_mask, image_latents, noise))
