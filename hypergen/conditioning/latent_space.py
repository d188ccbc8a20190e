"""Latent space: initial noise, added noise and encoded input images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor

from hypergen.denoising.denoising_state import DenoisingState
from hypergen.denoising.offload import device_of


@dataclass(frozen=True)
class InitialLatents:
    """Latents before the first step, and the fields of `DenoisingState` that depend on them.

    Attributes:
        mask, masked_image_latents: of inpainting models, for the same fields of `ModelInputs`.
    """

    latents: Tensor
    step_index: int = 0
    after_step: Callable[[DenoisingState], Tensor] | None = None
    skip_denoising: bool = False
    mask: Tensor | None = None
    masked_image_latents: Tensor | None = None


def scale_initial_noise(scheduler: Any, noise: Tensor) -> Tensor:
    """Scale noise by the scheduler's `init_noise_sigma`, which flow matching schedulers do not have."""
    return noise * getattr(scheduler, "init_noise_sigma", 1.0)


def normalize_latents(vae: Any, latents: Tensor) -> Tensor:
    """From the latents of a VAE to those of the denoiser, by the fields of the VAE's configuration."""
    shift, scale = _shift_and_scale(vae, latents)
    return (latents - shift) * scale


def denormalize_latents(vae: Any, latents: Tensor) -> Tensor:
    """The inverse of `normalize_latents`."""
    shift, scale = _shift_and_scale(vae, latents)
    return latents / scale + shift


def _shift_and_scale(vae: Any, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return config.get("shift_factor") or 0.0, config.scaling_factor
    return _per_channel(mean, latents), config.scaling_factor / _per_channel(std, latents)


def _per_channel(values: Sequence[float], latents: Tensor) -> Tensor:
    # Filled on the device: a copy from the host would wait for its other work.
    return torch.cat([latents.new_full((1, 1, 1, 1), value) for value in values], dim=1)


class LatentSpace:
    """The latent space of a VAE, in the dtype of the denoiser.

    Args:
        vae: encodes one image per call, so that its bits never depend on other requests.
        upcast: encode in float32, for a VAE that overflows in float16.
    """

    # Encoded images to keep: requests for n images, or for several prompts, use one input image again.
    _KEPT = 8

    def __init__(self, vae: Any, dtype: torch.dtype, *, upcast: bool = False) -> None:
        self._vae = vae
        self._dtype = dtype
        self._upcast = upcast
        self._scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self._distributions: LRUCache[bytes, Any] = LRUCache(self._KEPT)

    def noise(self, width: int, height: int, generator: torch.Generator) -> Tensor:
        """Noise for an image of `width` x `height` pixels, sampled on the CPU."""
        shape = (
            1,
            self._vae.config.latent_channels,
            height // self._scale_factor,
            width // self._scale_factor,
        )
        return torch.randn(shape, generator=generator, dtype=self._dtype).to(device_of(self._vae))

    def encode(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Encode an input image and sample its latents, scaled for the denoiser.

        Args:
            image: -1..1, shape (1, 3, H, W), on the CPU.
        """
        key = hashlib.sha256(repr(image.shape).encode() + image.numpy().tobytes()).digest()
        if (distribution := self._distributions.get(key)) is None:
            distribution = self._distributions[key] = self._distribution(image)
        return normalize_latents(self._vae, distribution.sample(generator).to(self._dtype))

    def clear(self) -> None:
        """Forget the encoded images."""
        self._distributions.clear()

    def _distribution(self, image: Tensor) -> Any:
        own = self._vae.dtype
        dtype = torch.float32 if self._upcast else own
        # Not the decoder: it may be running, and CUDA graphs read its weights at their addresses.
        encoder = [part for part in (self._vae.encoder, self._vae.quant_conv) if part is not None]
        for part in encoder:
            part.to(dtype)
        try:
            return self._vae.encode(image.to(device_of(self._vae), dtype)).latent_dist
        finally:
            for part in encoder:
                part.to(own)
