"""Placement: networks that stay on a device, and networks that take offloader there."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn


class ModelOffloader:
    """Lets one network at a time be on a device; the others wait in the memory of the machine.

    accelerate's own hooks expect networks to be called in one order, with an end at which all are free; here
    a new request's prompt may be read between any two steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._loaded: nn.Module | None = None

    def register(self, network: nn.Module) -> None:
        add_hook_to_module(network.to("cpu"), OffloadHook(self))

    def load(self, network: nn.Module) -> None:
        """Bring a network to the device, and the one before it away."""
        if self._loaded is network:
            return
        # The engine runs in inference mode, in which quantized weights cannot be moved.
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
    """Those that a network takes part in; None where it stays on its device."""
    hook = getattr(network, "_hf_hook", None)
    return hook.offloader if isinstance(hook, OffloadHook) else None


def device_of(network: Any) -> torch.device:
    """Where a network runs, wherever it waits."""
    offloader = offloader_of(network)
    return network.device if offloader is None else offloader.device
