"""Copies of tensors to the host that nobody waits for before they are needed."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """Tensors on their way to the host, complete after `wait`, which another thread may call.

    A CUDA device copies to pinned memory, which until then holds what was there before: another image.
    Asynchronous copies from other accelerators are unsafe, so those are complete at once.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if not any(tensor.is_cuda for tensor in tensors):
            self._tensors = tuple(tensor.cpu() for tensor in tensors)
            return
        self._tensors = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)
        self._done = torch.cuda.Event()
        self._done.record()

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors on the CPU.

        Raises:
            torch.AcceleratorError: the device is lost.
        """
        if self._done is not None:
            self._done.synchronize()
        return self._tensors
