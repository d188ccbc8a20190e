"""The forward pass of listed shapes, compiled with torch.compile when the model is loaded."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Hashable
from itertools import chain
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from hypergen.denoising.denoising_state import ModelInputs
from hypergen.errors import SettingError
from hypergen.models.cfg import ForwardInputs, map_rows
from hypergen.models.family import Family

logger = logging.getLogger(__name__)

# Each size of each model in the process is one more version of the same code; torch allows 8 by default.
_MAX_VERSIONS = 1024


class CompiledForward:
    """Replaces a family's `forward`: compiled for the shapes given to `compile`, eager for all others.

    The compiled network is a copy of the denoiser with the same weights. So what changes the layers of the
    eager one, such as the hooks of LoRAs, neither reaches compiled code nor lets it be compiled again. If a
    request can have a LoRA, only the copy of a UNet is channels last, because the convolutions of LoRAs need
    contiguous inputs. It then has its own weights of convolutions.
    """

    def __init__(self, family: Family) -> None:
        self._forward = family.forward
        self._shapes: set[Hashable] = set()
        network: Any = family.denoiser
        # cuDNN's convolutions need it. Inductor would reorder the weights in each forward pass.
        channels_last = isinstance(network, UNet2DConditionModel) and family.device.type == "cuda"
        if channels_last and not (family.lora_manager and family.lora_manager.has_loras):
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  torch's stub lacks it
        self._compiled = copy.copy(family)
        self._compiled.denoiser = _copy(network, _channels_last if channels_last else lambda weight: weight)
        self.network: nn.Module = self._compiled.denoiser
        compile_network(self.network)
        _replace_forward(family, self)

    def __call__(
        self,
        latents: Tensor,
        timesteps: Tensor,
        inputs: ModelInputs,
        batch_key_extra: tuple[Hashable, ...] = (),
    ) -> Tensor:
        """See `Family.forward`."""
        arguments = latents, timesteps, inputs
        if batch_key_extra or _shape_of(arguments) not in self._shapes:
            return self._forward(*arguments, batch_key_extra=batch_key_extra)
        with torch.compiler.set_stance("eager_on_recompile"):  # never compile while requests wait
            return self._run_compiled(arguments)

    def compile(self, arguments: ForwardInputs, size: str) -> None:
        """Compile for the shapes of these arguments, which takes minutes, unless this was done before.

        Args:
            size: for the log.

        Raises:
            SettingError: torch.compile failed.
        """
        if _shape_of(arguments) in self._shapes:
            return
        started = time.monotonic()
        try:
            with torch._dynamo.config.patch(
                recompile_limit=_MAX_VERSIONS,
                accumulated_recompile_limit=_MAX_VERSIONS,
                fail_on_recompile_limit_hit=True,  # otherwise it would run eagerly, with other bits
            ):
                self._run_compiled(arguments)
            with torch.compiler.set_stance("fail_on_recompile"):
                self._run_compiled(arguments)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            logger.exception("torch.compile failed for %s.", size)
            reason = " ".join(str(error).split())
            raise SettingError("compile", f"on: torch.compile failed for {size}: {reason[:300]}") from None
        self._shapes.add(_shape_of(arguments))
        logger.info("Compiled %s for %d rows in %.1f s.", size, len(arguments[0]), time.monotonic() - started)

    def _run_compiled(self, arguments: ForwardInputs) -> Tensor:
        # Compiled code is also chosen by strides, which may depend on the other images of a batch.
        latents, timesteps, inputs = map_rows(arguments, Tensor.contiguous)
        return type(self._compiled).forward(self._compiled, latents, timesteps, inputs)


def compile_network(network: Any) -> None:
    """Compile for static shapes. Kernels are not chosen by timing: those could differ after a restart.

    A transformer's repeated blocks are compiled once per shape instead of the whole network.
    """
    by_block = not isinstance(network, UNet2DConditionModel) and getattr(network, "_repeated_blocks", None)
    if by_block:
        network.compile_repeated_blocks(dynamic=False)
    else:
        network.compile(dynamic=False)


def _copy(network: nn.Module, layout_of: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a network that shares the weights that `layout_of` returns as they are."""
    weights = chain(network.parameters(), network.buffers())
    return copy.deepcopy(network, {id(tensor): layout_of(tensor) for tensor in weights})


def _channels_last(tensor: Tensor) -> Tensor:
    if tensor.dim() != 4 or tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor
    return nn.Parameter(tensor.to(memory_format=torch.channels_last), requires_grad=False)


def _shape_of(arguments: ForwardInputs) -> Hashable:
    latents, timesteps, inputs = arguments
    tensors = {"latents": latents, "timesteps": timesteps, **vars(inputs)}
    return tuple((name, t.shape, t.dtype) for name, t in tensors.items() if t is not None)


def _replace_forward(family: Any, forward: CompiledForward) -> None:
    family.forward = forward
