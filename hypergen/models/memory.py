"""Memory settings: quantization, VAE tiling and offload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hypergen import optional_packages
from hypergen.config import EngineSettings
from hypergen.config.values import Quantization
from hypergen.denoising.offload import ModelOffloader
from hypergen.errors import SettingError

# Of a forward pass with these latents: leaves memory for decoding them.
LeaveRoom = Callable[[Tensor], AbstractContextManager[object]]

# Pixels: decoding a tile takes little memory, and an image has few seams.
_TILE_SIDE = 512


def direct_device(settings: EngineSettings, device: torch.device) -> torch.device | None:
    """The device that weights are loaded to at once; None: they are changed or kept on the CPU first."""
    if device.type != "cuda" or settings.quantization != "off" or settings.offload != "off":
        return None
    # transformers first allocates all but 1.2 GiB of it, or fails if there is less.
    return device if torch.cuda.get_device_properties(device).total_memory > 2 * 1024**3 else None


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
        denoiser: Any = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
        quantize(denoiser, settings.quantization, device)
    if settings.vae_tiling != "off":
        _apply_tiling(pipeline)
    if settings.offload == "off":
        return pipeline.to(device)
    offloader = offloader or ModelOffloader(device)
    for network in pipeline.components.values():
        if isinstance(network, nn.Module):
            offloader.register(network)
    return pipeline


def quantize(denoiser: nn.Module, mode: Quantization, device: torch.device) -> None:
    """Quantize the weights of linear layers to 8 bits; activations keep their dtype.

    Raises:
        SettingError: torchao is not installed.
    """
    optional_packages.require("torchao", "quantization", mode)
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]  an extra
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    configuration = Int8WeightOnlyConfig() if mode == "int8" else Float8WeightOnlyConfig()
    # Layer by layer on the device: faster, and the device never holds all unquantized weights.
    quantize_(denoiser, configuration, device=None if device.type == "cpu" else device)


def enable_vae_tiling(vae: Any, side: int = _TILE_SIDE) -> None:
    """Let a VAE encode and decode in tiles of `side` pixels."""
    scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
    vae.use_tiling = True
    vae.tile_sample_min_size, vae.tile_latent_min_size = side, side // scale_factor


@contextmanager
def vae_tiling(vae: Any, side: int = _TILE_SIDE) -> Iterator[None]:
    """Let a VAE work in tiles of `side` pixels inside."""
    before = vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size
    enable_vae_tiling(vae, side)
    try:
        yield
    finally:
        vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = before


@contextmanager
def memory_left_free(size_bytes: float) -> Iterator[None]:
    """Let CUDA allocations inside fail where less than `size_bytes` of the device's memory would be left.

    Memory that torch keeps for later allocations counts as free.
    """
    free, total = torch.cuda.mem_get_info()
    limit = free + torch.cuda.memory_reserved() - size_bytes
    torch.cuda.set_per_process_memory_fraction(max(limit, 0) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _apply_tiling(pipeline: Any) -> None:
    vae = getattr(pipeline, "vae", None)
    if vae is None:  # a refiner uses the VAE of its base model
        return
    check_tiling(vae)
    enable_vae_tiling(vae)


def check_tiling(vae: Any) -> None:
    """
    Raises:
        SettingError: a VAE has no tiles.
    """
    if not hasattr(vae, "tile_latent_min_size"):
        raise SettingError("vae_tiling", f"is not supported for this model's {type(vae).__name__}.")
