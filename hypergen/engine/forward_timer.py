"""How long forward passes take, without a wait for the latest one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Steps that the host may be ahead of a CUDA device: while it runs one, the next is launched.
_AHEAD = 2


class ForwardTimer:
    """Measures forward passes by the clock, or on CUDA by events that are read one step later.

    Args:
        device: where they run.
        clock: seconds, for devices without events.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self._device = device
        self._clock = clock
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event, Callable[[float], None]]] = deque()

    @contextmanager
    def measure(self, record: Callable[[float], None]) -> Iterator[None]:
        """Time the launches inside; `record` gets the seconds, on CUDA during a later step.

        On CUDA this first waits until the device has finished all but the last step, so that the host is at
        most one step ahead and a new request does not wait for more.
        """
        if self._device.type == "cuda":
            while len(self._pending) >= _AHEAD:
                self._collect()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._pending.append((start, end, record))
            return
        started = self._clock()
        yield
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        record(self._clock() - started)

    def _collect(self) -> None:
        start, end, record = self._pending.popleft()
        end.synchronize()
        record(start.elapsed_time(end) / 1000)
