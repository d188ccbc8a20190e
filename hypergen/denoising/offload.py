"""Placement: networks that stay on a device, and networks that take turns there."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn


class Turns:
    """Lets one network at a time be on a device; the others wait in the memory of the machine.

    accelerate's own hooks expect networks to be called in one order, with an end at which all are free; here
    a new request's prompt may be read between any two steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._there: nn.Module | None = None

    def join(self, network: nn.Module) -> None:
        add_hook_to_module(network.to("cpu"), _Turn(self))

    def take(self, network: nn.Module) -> None:
        """Bring a network to the device, and the one before it away."""
        if self._there is network:
            return
        # The engine runs in inference mode, in which quantized weights cannot be moved.
        with torch.inference_mode(False), torch.no_grad():
            if self._there is not None:
                self._there.to("cpu")
            network.to(self.device)
        self._there = network


class _Turn(ModelHook):
    """Runs before a network's forward, and before an autoencoder's encode and decode."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.execution_device = turns.device

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.turns.take(module)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)


def turns_of(network: Any) -> Turns | None:
    """Those that a network takes part in; None where it stays on its device."""
    hook = getattr(network, "_hf_hook", None)
    return hook.turns if isinstance(hook, _Turn) else None


def device_of(network: Any) -> torch.device:
    """Where a network runs, wherever it waits."""
    turns = turns_of(network)
    return network.device if turns is None else turns.device
