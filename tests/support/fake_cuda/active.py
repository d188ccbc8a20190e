"""The device that is pretended now."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.support.fake_cuda.device import FakeCuda

_devices: list[FakeCuda] = []


def current() -> FakeCuda:
    assert _devices, "no fake device"
    return _devices[-1]


def replays() -> int:
    """How often graphs ran; 0 without a device."""
    return _devices[-1].replayed if _devices else 0


def enter(device: FakeCuda) -> None:
    assert not _devices, "one fake device at a time"
    _devices.append(device)


def leave() -> None:
    _devices.clear()


def place() -> str:
    """The innermost line outside of torch and this file."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/fake_cuda/" not in path and "/torch/" not in path:
            for root in ("site-packages/", "/main/"):
                path = path.rpartition(root)[2]
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
