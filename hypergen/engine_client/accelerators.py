"""Accelerators of this machine, found without torch; one engine process is started for each."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path


def visible_accelerators(device: str | None) -> list[dict[str, str]]:
    """One environment per GPU; a single empty one if there is no GPU, `device` is not cuda, or the installed
    torch has no GPU support.
    """
    if device not in (None, "cuda") or not (device or _torch_has_cuda()):
        return [{}]
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        names = [name.strip() for name in listed.split(",") if name.strip()]
    else:
        import pynvml

        try:
            pynvml.nvmlInit()
            names = [str(index) for index in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError:
            names = []
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names] or [{}]


def has_gpu(device: str | None) -> bool:
    """Whether engines with this `device` setting run on a GPU."""
    is_apple = sys.platform == "darwin" and platform.machine() == "arm64"
    return device == "mps" or (device is None and is_apple) or any(visible_accelerators(device))


def _torch_has_cuda() -> bool:
    """Whether torch was built for CUDA or ROCm, judged by its libraries: importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    folders = (spec.submodule_search_locations or []) if spec else []
    libraries = [library.name for folder in folders for library in (Path(folder) / "lib").glob("*torch_*")]
    return any("torch_cuda" in name or "torch_hip" in name for name in libraries)
