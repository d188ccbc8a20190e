"""Model offload: only one network is on the device at a time."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn


class ModelOffloader:
    """Keeps one network at a time on a device and the others in CPU memory.

    accelerate's own hooks expect one fixed order of networks and an end after which all are offloaded; here a
    new request's prompt may be encoded between any two steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._loaded: nn.Module | None = None

    def register(self, network: nn.Module) -> None:
        add_hook_to_module(network.to("cpu"), OffloadHook(self))

    def load(self, network: nn.Module) -> None:
        """Move a network to the device, and the previous one to the CPU."""
        if self._loaded is network:
            return
        # Quantized weights cannot be moved in inference mode, in which the engine runs.
        with torch.inference_mode(False), torch.no_grad():
            if self._loaded is not None:
                self._loaded.to("cpu")
            network.to(self.device)
        self._loaded = network


class OffloadHook(ModelHook):
    """Runs before a network's forward, and before an autoencoder's encode and decode."""

    def __init__(self, offloader: ModelOffloader) -> None:
        self.offloader = offloader
        self.execution_device = offloader.device

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.offloader.load(module)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)


def offloader_of(network: Any) -> ModelOffloader | None:
    """The offloader of a network; None: it stays on its device."""
    hook = getattr(network, "_hf_hook", None)
    return hook.offloader if isinstance(hook, OffloadHook) else None


def device_of(network: Any) -> torch.device:
    """The device that a network runs on, even while it is offloaded."""
    offloader = offloader_of(network)
    return network.device if offloader is None else offloader.device
