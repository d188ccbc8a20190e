"""Previews of images between two denoising steps.

The predicted clean latents become an image in one of two ways. A small VAE decodes them. A large VAE would
delay the next steps of all requests. There a linear map computes an RGB color from each latent pixel and its
neighbors. It is fitted at its first use by least squares on random images: from their latents to their pixels
at the size of the latents.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from hypergen.conditioning.latent_space import normalize_latents
from hypergen.denoising.denoising_state import DenoisingState
from hypergen.denoising.offload import device_of
from hypergen.denoising.schedulers import is_edm
from hypergen.engine.host_copy import HostCopy
from hypergen.engine.postprocess import Report, to_pixels
from hypergen.events import Preview
from hypergen.images import encoding
from hypergen.models.family import Family

logger = logging.getLogger(__name__)

_FIT_IMAGES = 16
_FIT_IMAGE_SIZE = 128  # in pixels, width and height
_MAX_RECTANGLES = 3  # per image: VAEs that normalize over the whole image need large areas of one color
_RIDGE = 1e-3  # regularization, against channels that are almost equal


# Parameters of a VAE that decodes about as fast as a denoising step, for example the embedded model's.
_SMALL_VAE_PARAMETERS = 5_000_000


class Previewer:
    """Reports previews of running images; belongs to the engine's thread.

    Args:
        encoders: executor that encodes image files.
    """

    def __init__(self, family: Family, report: Report, encoders: Executor) -> None:
        self._family = family
        self._report = report
        self._encoders = encoders
        self._use_vae = sum(p.numel() for p in family.vae.parameters()) <= _SMALL_VAE_PARAMETERS
        self._latent_to_rgb: LatentToRgb | None = None

    def maybe_preview(self, state: DenoisingState, prediction: Tensor, steps: int) -> None:
        """Report a preview if one is due at this step. Called with the prediction, before the scheduler step.

        Args:
            steps: denoising steps of the image in total; image-to-image skips the first ones.
        """
        try:
            due = sorted(preview_steps(steps, state.request.partial_images))
            step = steps - state.remaining_steps + 1
            if step not in due:
                return
            latents = pred_original_sample(state, prediction)
            if self._use_vae:
                image = self._family.decode(replace(state, latents=latents.to(state.latents.dtype)))
                source = HostCopy(to_pixels(image))
            else:
                self.prepare()
                source = HostCopy(latents.float())
            self._encoders.submit(self._encode, state, due.index(step), source)
        except Exception:  # Isolate the failure: the image is generated without previews.
            logger.exception("A preview of request %s could not be generated.", state.request.id)

    def prepare(self) -> None:
        """Fit the linear map, which waits for the device."""
        if not self._use_vae and self._latent_to_rgb is None:
            self._latent_to_rgb = LatentToRgb(partial(_encode_latents, self._family.vae))

    def _encode(self, state: DenoisingState, number: int, source: HostCopy) -> None:
        request = state.request
        try:
            (pixels,) = source.wait()
            if self._latent_to_rgb is not None:
                pixels = to_pixels(self._latent_to_rgb(pixels))
            image = Image.fromarray(pixels.numpy())
            generation_size = self._family.generation_size(request.width, request.height)
            if image.size != generation_size:
                image = image.resize(generation_size, Image.Resampling.BICUBIC)
            # Without metadata: those settings would not reproduce the preview.
            data = encoding.encode_image(np.asarray(image), replace(request, metadata=False), state.index, "")
        except Exception:  # Isolate the failure: if encoding fails in general, the final image reports it.
            logger.exception("A preview of request %s could not be encoded.", request.id)
            return
        self._report(request.id, Preview(index=state.index, number=number, data=data))


class LatentToRgb:
    """A linear map from latents to RGB colors, fitted to a VAE.

    Args:
        encode: from pixels in -1..1, shape (1, 3, H, W), to scaled latents, shape (1, C, h, w).
    """

    def __init__(self, encode: Callable[[Tensor], Tensor]) -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        features: list[Tensor] = []
        colors: list[Tensor] = []
        for number in range(_FIT_IMAGES):
            image = _random_image(1 + number % _MAX_RECTANGLES, generator)
            latents = encode(image).float().cpu()
            features.append(_neighborhoods(latents))
            height, width = latents.shape[-2:]
            colors.append(_flatten(functional.adaptive_avg_pool2d(image, (height, width))))
        x, y = torch.cat(features).double(), torch.cat(colors).double()
        ridge = _RIDGE * torch.eye(x.shape[1], dtype=torch.float64)
        self._map = torch.linalg.solve(x.T @ x + ridge, x.T @ y).float()

    def __call__(self, latents: Tensor) -> Tensor:
        """From latents on the CPU, float32, shape (1, C, h, w), to pixels in -1..1, shape (1, 3, h, w)."""
        colors = _neighborhoods(latents) @ self._map
        return colors.T.reshape(1, 3, *latents.shape[-2:]).clamp(-1, 1)


def preview_steps(steps: int, previews: int) -> frozenset[int]:
    """The steps after which a preview is due: evenly spread, never the last step."""
    due = (round(steps * (number + 1) / (previews + 1)) for number in range(previews))
    return frozenset(step for step in due if 0 < step < steps)


def pred_original_sample(state: DenoisingState, prediction: Tensor) -> Tensor:
    """The predicted clean latents at the current step, shape (1, C, h, w).

    The model input of every sampler is sqrt(alpha_bar) * clean + sqrt(1 - alpha_bar) * noise for a
    variance-preserving model, and (1 - sigma) * clean + sigma * noise for flow matching. Models of EDM
    (https://arxiv.org/abs/2206.00364) predict a part of the clean latents.

    Args:
        prediction: of the model's prediction type (noise, velocity or flow), guidance applied.
    """
    scheduler = state.scheduler
    noisy, timestep = state.model_input().float(), state.timestep.float().cpu()
    prediction = prediction.float()
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if is_edm(scheduler):
        sigma = (4 * timestep).exp()
        return scheduler.precondition_outputs(state.latents.float(), prediction, sigma)
    if alphas_cumprod is None:
        return noisy - float(timestep) / scheduler.config["num_train_timesteps"] * prediction
    # Timesteps of some samplers are between two training timesteps.
    below = int(timestep.floor().clamp(0, len(alphas_cumprod) - 1))
    above = min(below + 1, len(alphas_cumprod) - 1)
    alpha_bar = float(torch.lerp(alphas_cumprod[below].cpu(), alphas_cumprod[above].cpu(), timestep - below))
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    match scheduler.config["prediction_type"]:
        case "v_prediction":
            return signal * noisy - noise * prediction
        case "sample":
            return prediction
        case _:
            return (noisy - noise * prediction) / signal


def _encode_latents(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels in -1..1 to scaled latents."""
    latents = vae.encode(pixels.to(device_of(vae), vae.dtype)).latent_dist.mode()
    return normalize_latents(vae, latents)


def _random_image(rectangles: int, generator: torch.Generator) -> Tensor:
    """Rectangles of random colors on a random background color, shape (1, 3, 128, 128) in -1..1."""
    image = torch.empty(1, 3, _FIT_IMAGE_SIZE, _FIT_IMAGE_SIZE)
    image[:] = torch.rand(1, 3, 1, 1, generator=generator) * 2 - 1
    for _ in range(rectangles):
        height, width = torch.randint(
            _FIT_IMAGE_SIZE // 8, _FIT_IMAGE_SIZE // 2, (2,), generator=generator
        ).tolist()
        top, left = torch.randint(0, _FIT_IMAGE_SIZE // 2, (2,), generator=generator).tolist()
        image[..., top : top + height, left : left + width] = (
            torch.rand(1, 3, 1, 1, generator=generator) * 2 - 1
        )
    return image


def _flatten(image: Tensor) -> Tensor:
    """(1, C, h, w) to (h x w, C)."""
    return image[0].flatten(1).T


def _neighborhoods(latents: Tensor) -> Tensor:
    """For each latent pixel the values of its 3x3 neighborhood, and a 1 as bias: shape (h x w, 9 x C + 1)."""
    padded = functional.pad(latents, (1, 1, 1, 1), mode="replicate")
    features = functional.unfold(padded, 3)[0].T
    return torch.cat([features, torch.ones(len(features), 1)], dim=1)
