"""Fitting: what makes a model fit into a machine with little memory."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hypergen.config import EngineSettings, Quantization
from hypergen.denoising.offload import ModelOffloader
from hypergen.errors import ModelError

# Pixels of a tile's side: what a decoder does with it takes little, and the seams are few.
_TILE_SIDE = 512
# A decoder of AutoencoderKL's kind holds so many maps of its second width at once, at the picture's size:
# 3.5 to 3.8 were counted at those of Stable Diffusion.
_MAPS = 4
# Of the memory that weights leave; the rest is for the denoiser's pass and for what is lost between blocks.
_SHARE = 0.8


def apply_memory_settings(
    pipeline: Any, settings: EngineSettings, device: torch.device, offloader: ModelOffloader | None = None
) -> Any:
    """A pipeline that was loaded on the CPU, made smaller and put where it runs, as the settings say.

    Args:
        offloader: of the model that this one belongs to; absent: of its own, if there are to be any.

    Raises:
        ModelError: a setting needs another device, or a library that is not there.
    """
    if settings.quantization != "off":
        denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
        if denoiser is None:
            raise ModelError("The setting quantization goes with models that have a UNet or a transformer.")
        quantize(denoiser, settings.quantization, device)
    if settings.vae_tiling != "off":
        _tile(pipeline, settings, device)
    if settings.offload == "off":
        return pipeline.to(device)
    if device.type == "cpu":
        raise ModelError("The setting offload moves models to an accelerator; this one is on the CPU.")
    excluded = {
        "compile": settings.compile != "off",
        "decode_stream": settings.decode_stream,
    }
    if other := next((name for name, wanted in excluded.items() if wanted), None):
        raise ModelError(f"The settings offload and {other} do not go together.")
    offloader = offloader or ModelOffloader(device)
    for network in pipeline.components.values():
        if isinstance(network, nn.Module):
            offloader.register(network)
    return pipeline


def quantize(denoiser: nn.Module, kind: Quantization, device: torch.device) -> None:
    """Keep the weights of linear layers in 8 bits; what is multiplied with them stays as it is.

    Raises:
        ModelError: torchao is not installed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ModelError(
            f"The setting quantization={kind} needs torchao: pip install 'hypergen[quantization]'."
        )
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]  an extra
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    configuration = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
    # Layer by layer on the device, which is faster and never holds all of the larger weights.
    quantize_(denoiser, configuration, device=None if device.type == "cpu" else device)


def enable_vae_tiling(vae: Any, side: int = _TILE_SIDE, memory: float = 0) -> None:
    """Let an autoencoder work on tiles of at most `side` pixels, for pictures that `memory` does not hold."""
    scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
    vae.tile_sample_min_size, vae.tile_latent_min_size = side, side // scale_factor

    def choosing(run: Callable[..., Any], pixels_each: int, x: Tensor, *args: Any, **named: Any) -> Any:
        vae.use_tiling = math.prod(x.shape[-2:]) * pixels_each > pixels_that_fit(vae, memory)
        return run(x, *args, **named)

    vae.encode = partial(choosing, vae.encode, 1)
    vae.decode = partial(choosing, vae.decode, scale_factor**2)


def _tile(pipeline: Any, settings: EngineSettings, device: torch.device) -> None:
    vae = getattr(pipeline, "vae", None)
    if vae is None:  # a refiner's, which the base model has
        return
    if not hasattr(vae, "tile_latent_min_size"):
        raise ModelError(f"The setting vae_tiling does not go with this model's {type(vae).__name__}.")
    if settings.vae_tiling == "on":
        enable_vae_tiling(vae)
        return
    if device.type != "cuda":
        raise ModelError("The setting vae_tiling=auto reads the memory of a CUDA device; use on or off.")
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    staying = [vae] if settings.offload == "model" else networks
    total = torch.cuda.get_device_properties(device).total_memory
    enable_vae_tiling(vae, memory=total - sum(map(_bytes, staying)))


def pixels_that_fit(vae: Any, memory: float) -> float:
    """The largest picture that is decoded at once. It depends on what a device has and not on what is free
    just now, so that the same request gives the same bytes tomorrow.

    Args:
        memory: bytes that the weights leave.
    """
    width = vae.config.block_out_channels[:2][-1]
    return max(0.0, memory * _SHARE / (_MAPS * width * vae.dtype.itemsize))


def _bytes(network: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())
