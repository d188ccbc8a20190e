"""Optimizations by settings: memory format, compilation and attention kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hypergen.config import Attention, EngineSettings
from hypergen.denoising.denoising_state import ModelInputs
from hypergen.engine.warmup import rows_per_image
from hypergen.errors import ModelError
from hypergen.models.cfg import map_rows
from hypergen.models.family import Family

Forward = Callable[..., Tensor]

_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# One per row count, latent shape and prompt length; torch stops compiling after 8 by default.
_MAX_COMPILED_SHAPES = 512


def apply_optimizations(family: Family, settings: EngineSettings) -> None:
    """Apply the settings to a loaded family.

    Raises:
        ModelError: a setting is not supported on the model's device.
    """
    device = family.device.type
    if settings.channels_last:
        for network in (family.denoiser, family.vae, *family.controlnets.values()):
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  torch's stub lacks it
    forward = family.forward
    if settings.compile != "off":
        torch._dynamo.config.recompile_limit = _MAX_COMPILED_SHAPES
        compile_network(family.denoiser)
        forward = _padded_to_bucket(forward, rows_per_image(family))
    if settings.attention is not None:
        forward = _with_attention(forward, settings.attention, device)
    _replace_forward(family, forward)


def compile_network(network: Any) -> None:
    """Compile for static shapes. Kernels are not chosen by timing: those could differ after a restart.

    A transformer's repeated blocks are compiled once per shape instead of the whole network.
    """
    by_block = not isinstance(network, UNet2DConditionModel) and getattr(network, "_repeated_blocks", None)
    if by_block:
        network.compile_repeated_blocks(dynamic=False)
    else:
        network.compile(dynamic=False)


def bucket_size(rows: int, min_rows: int = 2) -> int:
    """The row count that a compiled forward pass is padded to: `min_rows` (1 or 2), 2, 4, 8 ..."""
    return max(min_rows, 1 << (rows - 1).bit_length())


def _padded_to_bucket(forward: Forward, min_rows: int) -> Forward:
    """Pad batches with copies of the last row, so that few shapes are compiled.

    Args:
        min_rows: see `bucket_size`.
    """

    def padded_forward(latents: Tensor, timesteps: Tensor, inputs: ModelInputs, **kwargs: Any) -> Tensor:
        rows = latents.shape[0]
        padding = bucket_size(rows, min_rows) - rows

        def pad(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor[-1:].expand(padding, *tensor.shape[1:])])

        return forward(*map_rows((latents, timesteps, inputs), pad), **kwargs)[:rows]

    return padded_forward


def _with_attention(forward: Forward, kernel: Attention, device: str) -> Forward:
    def forward_with_kernel(*args: Any, **kwargs: Any) -> Tensor:
        try:
            with sdpa_kernel(_KERNELS[kernel]):
                return forward(*args, **kwargs)
        except RuntimeError as error:
            if "No available kernel" not in str(error) and "No viable backend" not in str(error):
                raise
            raise ModelError(f"Attention '{kernel}' is not supported for this model on {device}.") from None

    return forward_with_kernel


def _replace_forward(family: Any, forward: Forward) -> None:
    family.forward = forward
