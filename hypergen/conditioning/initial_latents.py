"""Initial latents: from noise alone, from an input image (img2img), or with a mask (inpainting)."""

from __future__ import annotations

from typing import Any

import torch

from hypergen.conditioning import img2img, inpaint
from hypergen.conditioning.latent_space import InitialLatents, LatentSpace, scale_initial_noise
from hypergen.errors import InvalidRequestError
from hypergen.request import GenerationRequest


def prepare_initial_latents(
    request: GenerationRequest,
    scheduler: Any,
    space: LatentSpace,
    size: tuple[int, int],
    generator: torch.Generator,
    *,
    inpaint_model: inpaint.InpaintModel | None = None,
) -> InitialLatents:
    """Prepare the latents of one image before its first step.

    Args:
        scheduler: this image's; with an input image its first steps are skipped.
        size: generation size (width, height) in pixels.
        generator: this image's, not used before.
        inpaint_model: see `inpaint.prepare_latents`.

    Raises:
        InvalidRequestError: there is a mask but no input image.
    """
    if request.mask is not None and request.image is None:
        raise InvalidRequestError("A mask needs an input image.", param="mask")
    if (
        request.image is not None
        and img2img.get_start_step(request, scheduler) == request.num_inference_steps
    ):
        # No step runs: the latents only give the image its shape.
        return InitialLatents(space.noise(*size, generator), len(scheduler.timesteps), skip_denoising=True)
    if request.mask is not None or inpaint_model is not None:
        return inpaint.prepare_latents(request, scheduler, space, size, generator, model=inpaint_model)
    if request.image is not None:
        return img2img.prepare_latents(request, request.image, scheduler, space, size, generator)
    return InitialLatents(scale_initial_noise(scheduler, space.noise(*size, generator)))
