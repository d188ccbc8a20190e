"""Inputs of UNets that were trained for inpainting: mask and kept region as more channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypergen.conditioning.inpaint import InpaintModel
from hypergen.denoising.denoising_state import ModelInputs
from hypergen.errors import ModelError


def find_inpaint_model(unet: Any, vae: Any) -> InpaintModel | None:
    """`Family.find_inpaint_model` of families with a UNet."""
    channels, latent_channels = unet.config.in_channels, vae.config.latent_channels
    if channels not in (latent_channels, 2 * latent_channels + 1):
        raise ModelError(
            f"The UNet has {channels} input channels ('conv_in.weight'); supported are {latent_channels}, "
            f"and {2 * latent_channels + 1} for inpainting."
        )
    return None if channels == latent_channels else InpaintModel()


def with_mask(latents: Tensor, inputs: ModelInputs) -> Tensor:
    """The latents, for inpainting models with the mask and the kept region after their channels."""
    if inputs.mask is None or inputs.masked_image_latents is None:
        return latents
    return torch.cat([latents, inputs.mask, inputs.masked_image_latents], dim=1)
