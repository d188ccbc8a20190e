"""Acceleration: what a device may be told so that it draws the same pictures faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hypergen.config import Attention, EngineSettings
from hypergen.denoising.denoising_state import ModelInputs
from hypergen.engine.warmup import warm_up_request
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
# One for each number of rows, latent shape and prompt length; torch gives up after 8 by default.
_COMPILED_SHAPES = 512


def apply_optimizations(family: Family, settings: EngineSettings) -> None:
    """Change a loaded family as the settings say.

    Raises:
        ModelError: a setting needs another device than the model is on, or does not go with another.
    """
    device = family.device.type
    needs_cuda = {"compile=graphs": settings.compile == "graphs", "decode_stream": settings.decode_stream}
    for setting, wanted in needs_cuda.items():
        if wanted and device != "cuda":
            raise ModelError(f"The setting {setting} needs a CUDA device; this model is on {device}.")
    if settings.channels_last:
        for network in (family.denoiser, family.vae, *family.controlnets.values()):
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  torch's stub lacks it
    forward = family.forward
    if settings.compile != "off":
        graphs = settings.compile == "graphs"
        torch._dynamo.config.recompile_limit = _COMPILED_SHAPES
        compile_network(family.denoiser, graphs=graphs)
        forward = _in_buckets(forward, _fewest_rows(family), copy=graphs)
    if settings.attention is not None:
        forward = _with_attention(forward, settings.attention, device)
    _replace_forward(family, forward)


def compile_network(network: Any, *, graphs: bool) -> None:
    """Compile for fixed shapes, without choosing kernels by timing: those could differ after the next start.

    A transformer is its blocks, and all blocks of a kind are compiled once for each shape, not one by one. A
    CUDA graph is of the whole network.
    """
    in_blocks = not isinstance(network, UNet2DConditionModel) and getattr(network, "_repeated_blocks", None)
    if in_blocks and not graphs:
        network.compile_repeated_blocks(dynamic=False)
    else:
        network.compile(dynamic=False, mode="reduce-overhead" if graphs else None)


def bucket(rows: int, fewest: int = 2) -> int:
    """The number of rows that a compiled pass is filled up to: `fewest` (1 or 2), 2, 4, 8 ..."""
    return max(fewest, 1 << (rows - 1).bit_length())


@torch.inference_mode()
def _fewest_rows(family: Family) -> int:
    """The rows of one image as the model draws by default: where that is a single one, as with FLUX, filling
    it up would double what an image costs.
    """
    request = warm_up_request(family.model_info(""))
    return family.prepare(request, 0, family.encode_prompts(request)).rows


def _in_buckets(forward: Forward, fewest: int, copy: bool) -> Forward:
    """Fill a pass up with copies of its last row, so that few shapes are compiled.

    Args:
        fewest: see `bucket`.
        copy: the result stands in memory that the next pass overwrites.
    """

    def filled(latents: Tensor, timesteps: Tensor, inputs: ModelInputs, **named: Any) -> Tensor:
        count = latents.shape[0]
        missing = bucket(count, fewest) - count

        def fill(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])

        output = forward(*map_rows((latents, timesteps, inputs), fill), **named)
        return output[:count].clone() if copy else output[:count]

    return filled


def _with_attention(forward: Forward, kernel: Attention, device: str) -> Forward:
    def attending(*rows: Any, **named: Any) -> Tensor:
        try:
            with sdpa_kernel(_KERNELS[kernel]):
                return forward(*rows, **named)
        except RuntimeError as error:
            if "No available kernel" not in str(error) and "No viable backend" not in str(error):
                raise
            raise ModelError(f"Attention '{kernel}' cannot run this model on {device}.") from None

    return attending


def _replace_forward(family: Any, forward: Forward) -> None:
    family.forward = forward
