"""Accelerators of this machine, found without torch; one engine process is started for each."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hypergen.config import EngineSettings
from hypergen.device_names import DeviceType
from hypergen.errors import SettingError


@dataclass(frozen=True)
class Accelerator:
    """Where one engine runs.

    Attributes:
        device: such as cuda:1; None: the engine chooses.
        environment: added to the engine's environment, so that it sees this GPU alone.
    """

    device: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


def find_accelerators(settings: EngineSettings) -> list[Accelerator]:
    """Those of `--devices`, else every visible GPU, else a single one that the engine chooses.

    Raises:
        SettingError: this machine lacks one of the devices.
    """
    gpus = _visible_gpus(settings.device_type)
    found = {
        f"cuda:{index}": Accelerator(f"cuda:{index}", {"CUDA_VISIBLE_DEVICES": gpu})
        for index, gpu in enumerate(gpus)
    }
    if not settings.devices:
        return list(found.values()) or [Accelerator()]
    for device in settings.devices:
        if device.startswith("cuda") and device not in found:
            present = f"cuda:0 to cuda:{len(gpus) - 1}" if gpus else "no GPU"
            raise SettingError("devices", f"{device}: no such device; this machine has {present}.")
    return [found.get(device, Accelerator(device)) for device in settings.devices]


def find_device(settings: EngineSettings) -> DeviceType | None:
    """The type of the engines' devices; None: only torch can tell.

    Raises:
        SettingError: the installed torch does not support the device of the settings.
    """
    wanted = settings.device_type
    has_cuda = _torch_has_cuda()
    if wanted == "cpu" or (wanted is None and not has_cuda and not _is_apple()):
        return "cpu"
    if wanted is None and _is_apple():
        return "mps"
    if (wanted == "mps" and not _is_apple()) or (wanted == "cuda" and not has_cuda):
        given = ("devices", ",".join(settings.devices)) if settings.devices else ("device", wanted)
        raise SettingError(given[0], f"{given[1]}: this machine's torch has no {wanted}.")
    if wanted == "mps":
        return "mps"
    return "cuda" if _visible_gpus(wanted) else None


def has_gpu(device: DeviceType | None) -> bool:
    """Whether engines with devices of this type run on a GPU; None: the first available type."""
    return device == "mps" or (device is None and _is_apple()) or bool(_visible_gpus(device))


def _is_apple() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def _visible_gpus(device: DeviceType | None) -> list[str]:
    """For each GPU its name in CUDA_VISIBLE_DEVICES; empty if engines do not run on CUDA, or torch cannot."""
    if device not in (None, "cuda") or not (device or _torch_has_cuda()):
        return []
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip()]
    import pynvml

    try:
        pynvml.nvmlInit()
        return [str(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _torch_has_cuda() -> bool:
    """Whether torch was built for CUDA or ROCm, judged by its libraries: importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    folders = (spec.submodule_search_locations or []) if spec else []
    libraries = [library.name for folder in folders for library in (Path(folder) / "lib").glob("*torch_*")]
    return any("torch_cuda" in name or "torch_hip" in name for name in libraries)
