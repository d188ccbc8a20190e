"""Memory settings: quantization, VAE tiling and offload."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hypergen.config import EngineSettings, Quantization
from hypergen.denoising.offload import ModelOffloader, stays_on_device
from hypergen.errors import ModelError

# Pixels: decoding a tile takes little memory, and an image has few seams.
_TILE_SIDE = 512
# The decoder of AutoencoderKL holds up to this many feature maps of its second width at the image's size; 3.5
# to 3.8 were measured for Stable Diffusion.
_MAPS = 4
# Share of the memory next to the weights; the rest is for the denoiser's forward pass and fragmentation.
_SHARE = 0.8


def direct_device(settings: EngineSettings, device: torch.device) -> torch.device | None:
    """The device that weights are loaded to at once; None: they are changed or kept on the CPU first."""
    is_direct = device.type == "cuda" and settings.quantization == "off" and settings.offload == "off"
    return device if is_direct else None


def apply_memory_settings(
    pipeline: Any, settings: EngineSettings, device: torch.device, offloader: ModelOffloader | None = None
) -> Any:
    """Quantize a pipeline, enable tiling, and move it to its device.

    Args:
        offloader: of the base model, if `pipeline` is its refiner; None: a new one if the settings need it.

    Raises:
        ModelError: a setting needs another device or a missing library.
    """
    if settings.quantization != "off":
        denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
        if denoiser is None:
            raise ModelError("--quantization is only supported for models with a UNet or a transformer.")
        quantize(denoiser, settings.quantization, device)
    if settings.vae_tiling != "off":
        _apply_tiling(pipeline, settings, device)
    if settings.offload == "off":
        return pipeline.to(device)
    if device.type == "cpu":
        raise ModelError("--offload needs an accelerator; this model runs on the CPU.")
    if settings.compile != "off":
        raise ModelError("--offload and --compile cannot be combined.")
    offloader = offloader or ModelOffloader(device)
    for network in pipeline.components.values():
        if isinstance(network, nn.Module):
            offloader.register(network)
    return pipeline


def quantize(denoiser: nn.Module, mode: Quantization, device: torch.device) -> None:
    """Quantize the weights of linear layers to 8 bits; activations keep their dtype.

    Raises:
        ModelError: torchao is not installed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ModelError(f"--quantization {mode} needs torchao: pip install 'hypergen[quantization]'.")
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]  an extra
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    configuration = Int8WeightOnlyConfig() if mode == "int8" else Float8WeightOnlyConfig()
    # Layer by layer on the device: faster, and the device never holds all unquantized weights.
    quantize_(denoiser, configuration, device=None if device.type == "cpu" else device)


def enable_vae_tiling(vae: Any, side: int = _TILE_SIDE, memory: float = 0) -> None:
    """Let a VAE encode and decode in tiles of `side` pixels if an image does not fit into `memory` bytes."""
    scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
    vae.tile_sample_min_size, vae.tile_latent_min_size = side, side // scale_factor

    def with_tiling(
        run: Callable[..., Any], pixels_per_item: int, x: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        vae.use_tiling = math.prod(x.shape[-2:]) * pixels_per_item > max_untiled_pixels(vae, memory)
        return run(x, *args, **kwargs)

    vae.encode = partial(with_tiling, vae.encode, 1)
    vae.decode = partial(with_tiling, vae.decode, scale_factor**2)


@contextmanager
def vae_tiling(vae: Any, side: int = _TILE_SIDE) -> Iterator[None]:
    """Let a VAE work in tiles of `side` pixels inside."""
    scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
    before = vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size
    vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = True, side, side // scale_factor
    try:
        yield
    finally:
        vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = before


def _apply_tiling(pipeline: Any, settings: EngineSettings, device: torch.device) -> None:
    vae = getattr(pipeline, "vae", None)
    if vae is None:  # a refiner uses the VAE of its base model
        return
    if not hasattr(vae, "tile_latent_min_size"):
        raise ModelError(f"--vae-tiling is not supported for this model's {type(vae).__name__}.")
    if settings.vae_tiling == "on":
        enable_vae_tiling(vae)
        return
    if device.type != "cuda":
        raise ModelError("--vae-tiling auto needs a CUDA device; use on or off.")
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    if settings.offload != "off":
        networks = [network for network in networks if network is vae or stays_on_device(network)]
    total = torch.cuda.get_device_properties(device).total_memory
    enable_vae_tiling(vae, memory=total - sum(map(_bytes, networks)))


def max_untiled_pixels(vae: Any, memory: float) -> float:
    """The largest image, in pixels, that is decoded without tiles.

    It depends on the total memory of the device and not on the free memory, so that the same request always
    gives the same bytes.

    Args:
        memory: bytes next to the weights.
    """
    width = vae.config.block_out_channels[:2][-1]
    return max(0.0, memory * _SHARE / (_MAPS * width * vae.dtype.itemsize))


def _bytes(network: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())
