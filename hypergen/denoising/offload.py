"""Model offload: only one of the large networks is on the device at a time."""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn

from hypergen.denoising.host_weights import HostWeights

logger = logging.getLogger(__name__)

# Smaller networks stay on the device: CLIP's text encoders and VAEs, which run between any two steps.
_MIN_OFFLOADED_BYTES = 1e9


class ModelOffloader:
    """Keeps one large network at a time on a device, and the weights of all in main memory.

    accelerate's own hooks expect one fixed order of networks and an end after which all are offloaded; here a
    new request's prompt may be encoded between any two steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._weights: dict[nn.Module, HostWeights] = {}
        self._loaded: nn.Module | None = None

    def register(self, network: nn.Module) -> None:
        if stays_on_device(network):
            network.to(self.device)
        else:
            add_hook_to_module(network.to("cpu"), OffloadHook(self))

    def load(self, network: nn.Module) -> None:
        """Copy a network to the device, after dropping the copy of the previous one."""
        if self._loaded is network:
            return
        if self._loaded is not None:
            self._weights[self._loaded].unload()
            self._loaded = None
        # Not in `register`: until its first use a network may get another dtype or memory format.
        if network not in self._weights:
            self._weights[network] = _host_weights(network, self.device)
        self._weights[network].load()
        self._loaded = network


class OffloadHook(ModelHook):
    """Runs before a network's forward, and before an autoencoder's encode and decode."""

    def __init__(self, offloader: ModelOffloader) -> None:
        self.offloader = offloader
        self.execution_device = offloader.device

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.offloader.load(module)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)


def _host_weights(network: nn.Module, device: torch.device) -> HostWeights:
    try:
        return HostWeights([network], device, pin=device.type == "cuda")
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        logger.warning(
            "%s is offloaded without pinned memory, which is slower: %s", type(network).__name__, reason
        )
    return HostWeights([network], device, pin=False)


def stays_on_device(network: nn.Module) -> bool:
    """Whether a network is too small to be offloaded."""
    return sum(parameter.nbytes for parameter in network.parameters()) < _MIN_OFFLOADED_BYTES


def offloader_of(network: Any) -> ModelOffloader | None:
    """The offloader of a network; None: it stays on its device."""
    hook = getattr(network, "_hf_hook", None)
    return hook.offloader if isinstance(hook, OffloadHook) else None


def device_of(network: Any) -> torch.device:
    """The device that a network runs on, even while it is offloaded."""
    offloader = offloader_of(network)
    return network.device if offloader is None else offloader.device
