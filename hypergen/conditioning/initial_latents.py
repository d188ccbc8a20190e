"""Beginning: from noise alone, from a picture, or from a picture of which a part is kept."""

from __future__ import annotations

from typing import Any

import torch

from hypergen.conditioning import img2img, inpaint
from hypergen.conditioning.latent_space import Beginning, LatentSpace, at_the_start
from hypergen.errors import InvalidRequestError
from hypergen.request import GenerationRequest


def begin(
    request: GenerationRequest,
    scheduler: Any,
    space: LatentSpace,
    size: tuple[int, int],
    generator: torch.Generator,
    *,
    reads_mask: bool = False,
) -> Beginning:
    """The first latents of an image, and what goes with them.

    Args:
        scheduler: the image's own; begins later where a picture is given.
        size: width and height in pixels that are drawn.
        generator: the image's own; nothing was drawn from it before.
        reads_mask: see `inpaint.begin`.

    Raises:
        InvalidRequestError: there is a mask and no picture.
    """
    if request.mask is not None and request.image is None:
        raise InvalidRequestError("A mask says what to draw in a picture; none was sent.", param="mask")
    if request.image is not None and img2img.first_step(request, scheduler) == request.num_inference_steps:
        # Nothing is drawn; the latents only give the image its shape.
        return Beginning(space.noise(*size, generator), len(scheduler.timesteps), unchanged=True)
    if request.mask is not None or reads_mask:
        return inpaint.begin(request, scheduler, space, size, generator, reads_mask=reads_mask)
    if request.image is not None:
        return img2img.begin(request, request.image, scheduler, space, size, generator)
    return Beginning(at_the_start(scheduler, space.noise(*size, generator)))
