"""Previews: what a running image would be if it ended now.

The clean latents that a prediction points to become a picture in one of two ways. A small decoder decodes
them. A large one would hold up everybody's next steps; there a linear map gives each latent pixel and its
neighbours a colour. The map is fitted when it is first needed, by least squares, between the model's own
latents of rendered pictures and the pictures' pixels at the latents' size.
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

from hypergen.denoising.denoising_state import DenoisingState
from hypergen.denoising.offload import device_of
from hypergen.engine.postprocess import Report, to_pixels
from hypergen.events import Preview
from hypergen.images import encoding
from hypergen.models.family import Family

logger = logging.getLogger(__name__)

_PICTURES = 16
_SIDE = 128  # pixels of those pictures
_RECTANGLES = 3  # in each at most; decoders that normalise over a whole picture want large even areas
_RIDGE = 1e-3  # against channels that are nearly alike


# Weights of an autoencoder, the embedded model's for one, whose decoder costs about a step of its denoiser.
_SMALL_AUTOENCODER = 5_000_000


class Previewer:
    """Shows running images that want to be seen; belongs to the engine's thread.

    Args:
        encoders: where pixels become files.
    """

    def __init__(self, family: Family, report: Report, encoders: Executor) -> None:
        self._family = family
        self._report = report
        self._encoders = encoders
        self._decodes = sum(p.numel() for p in family.vae.parameters()) <= _SMALL_AUTOENCODER
        self._colours: LatentToRgb | None = None

    def maybe_preview(self, state: DenoisingState, prediction: Tensor, steps: int) -> None:
        """Show an image that is about to take a step along a prediction, if this step is one to show.

        Args:
            steps: that the image takes in all; one that begins from a picture does not take the first ones.
        """
        try:
            due = sorted(preview_steps(steps, state.request.partial_images))
            taken = steps - state.remaining_steps + 1
            if taken not in due:
                return
            clean = pred_original_sample(state, prediction).to(state.latents.dtype)
            pixels = to_pixels(self._draw(state, clean)).cpu()
            self._encoders.submit(self._encode, state, due.index(taken), pixels)
        except Exception:  # an image without previews is better than none
            logger.exception("A preview of %s could not be drawn.", state.request.id)

    def _draw(self, state: DenoisingState, clean: Tensor) -> Tensor:
        """Pixels in -1..1 of the drawn size, or of the latents' size."""
        if self._decodes:
            return self._family.decode(replace(state, latents=clean))
        if self._colours is None:
            self._colours = LatentToRgb(partial(_encode, self._family.vae))
        return self._colours(clean)

    def _encode(self, state: DenoisingState, number: int, pixels: Tensor) -> None:
        request = state.request
        try:
            image = Image.fromarray(pixels.numpy())
            drawn = self._family.generation_size(request.width, request.height)
            if image.size != drawn:
                image = image.resize(drawn, Image.Resampling.BICUBIC)
            # Without the settings: they do not make this picture.
            data = encoding.encode_image(np.asarray(image), replace(request, metadata=False), state.index, "")
        except Exception:  # the picture itself will tell why
            logger.exception("A preview of %s could not be written.", request.id)
            return
        self._report(request.id, Preview(index=state.index, number=number, data=data))


class LatentToRgb:
    """From latents to the colours that they stand for.

    Args:
        encode: pixels in -1..1, shape (1, 3, H, W), to latents as the sampler sees them, (1, C, h, w).
    """

    def __init__(self, encode: Callable[[Tensor], Tensor]) -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        rows: list[Tensor] = []
        colours: list[Tensor] = []
        for number in range(_PICTURES):
            picture = _random_picture(1 + number % _RECTANGLES, generator)
            latents = encode(picture).float().cpu()
            rows.append(_neighbourhoods(latents))
            height, width = latents.shape[-2:]
            colours.append(_rows(functional.adaptive_avg_pool2d(picture, (height, width))))
        known, wanted = torch.cat(rows).double(), torch.cat(colours).double()
        ridge = _RIDGE * torch.eye(known.shape[1], dtype=torch.float64)
        self._map = torch.linalg.solve(known.T @ known + ridge, known.T @ wanted).float()

    def __call__(self, latents: Tensor) -> Tensor:
        """Pixels in -1..1, shape (1, 3, h, w), of latents of shape (1, C, h, w)."""
        latents = latents.float().cpu()
        colours = _neighbourhoods(latents) @ self._map
        return colours.T.reshape(1, 3, *latents.shape[-2:]).clamp(-1, 1)


def preview_steps(steps: int, previews: int) -> frozenset[int]:
    """After how many of its steps an image shows itself: evenly spread, never the last one."""
    wanted = (round(steps * (number + 1) / (previews + 1)) for number in range(previews))
    return frozenset(step for step in wanted if 0 < step < steps)


def pred_original_sample(state: DenoisingState, prediction: Tensor) -> Tensor:
    """The latents without noise that a prediction at the present step points to, shape (1, C, h, w).

    Every sampler of a variance-preserving model shows the denoiser
    sqrt(alpha_bar) * clean + sqrt(1 - alpha_bar) * noise, whatever it keeps itself; a flow-matching one
    (1 - sigma) * clean + sigma * noise.

    Args:
        prediction: noise, velocity or flow, as the model was trained, guidance applied.
    """
    scheduler = state.scheduler
    noisy, timestep = state.model_input().float(), state.timestep.float().cpu()
    prediction = prediction.float()
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if alphas_cumprod is None:
        return noisy - float(timestep) / scheduler.config["num_train_timesteps"] * prediction
    # Some samplers stop between two of the steps that the model was trained on.
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


def _encode(autoencoder: Any, pixels: Tensor) -> Tensor:
    """Latents of a picture as samplers see them."""
    config = autoencoder.config
    latents = autoencoder.encode(pixels.to(device_of(autoencoder), autoencoder.dtype)).latent_dist.mode()
    return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor


def _random_picture(rectangles: int, generator: torch.Generator) -> Tensor:
    """Rectangles of random colours over a ground of another, shape (1, 3, 128, 128) in -1..1."""
    picture = torch.empty(1, 3, _SIDE, _SIDE)
    picture[:] = torch.rand(1, 3, 1, 1, generator=generator) * 2 - 1
    for _ in range(rectangles):
        height, width = torch.randint(_SIDE // 8, _SIDE // 2, (2,), generator=generator).tolist()
        top, left = torch.randint(0, _SIDE // 2, (2,), generator=generator).tolist()
        picture[..., top : top + height, left : left + width] = (
            torch.rand(1, 3, 1, 1, generator=generator) * 2 - 1
        )
    return picture


def _rows(image: Tensor) -> Tensor:
    """(1, C, h, w) to (h x w, C)."""
    return image[0].flatten(1).T


def _neighbourhoods(latents: Tensor) -> Tensor:
    """A row for each latent pixel with all that its eight neighbours hold, and a one: (h x w, 9 x C + 1)."""
    padded = functional.pad(latents, (1, 1, 1, 1), mode="replicate")
    rows = functional.unfold(padded, 3)[0].T
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
