"""Attention backends of diffusers, for transformers such as FLUX's.

`python -m hypergen.models.attention BACKEND` downloads the kernel of a backend from the hub. It prints
"OWNER/NAME=FOLDER", as in LOCAL_KERNELS, a variable of the package `kernels`.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from diffusers.models.attention_dispatch import (
    _HUB_KERNELS_REGISTRY,  # pyright: ignore[reportPrivateUsage]  the only way to a kernel's name and folder
    AttentionBackendName,
    attention_backend,
)
from torch import nn

from hypergen.errors import SettingError


def supports_attention_backends(denoiser: nn.Module) -> bool:
    """Whether its attention runs through diffusers' dispatcher; that of UNets and SD 3 calls torch itself."""
    processors = (getattr(module, "processor", None) for module in denoiser.modules())
    return any(hasattr(processor, "_attention_backend") for processor in processors)


def set_attention_backend(denoiser: Any, backend: str) -> None:
    """Let a denoiser use a backend, whose kernel must be on this machine.

    Raises:
        SettingError: unknown backend, or its package or kernel is missing.
    """
    names = sorted(name.value for name in AttentionBackendName)
    if backend not in names:
        raise SettingError("attention", f"{backend} is unknown to diffusers; it has {', '.join(names)}.")
    try:
        denoiser.set_attention_backend(backend)
    except Exception as error:  # of the backend's package, which may be any
        raise SettingError("attention", f"{backend} cannot be used: {_one_line(error)}") from None


def fetch_kernel(backend: str) -> str:
    """Download the kernel of a backend; returns "OWNER/NAME=FOLDER"."""
    with attention_backend(backend):  # downloads and imports it
        kernel = _HUB_KERNELS_REGISTRY[AttentionBackendName(backend)]
    file = Path(inspect.getfile(sys.modules[getattr(kernel.kernel_fn, "__module__", "")]))
    folder = next(parent.parent for parent in file.parents if parent.name == "build")
    return f"{kernel.repo_id}={folder}"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


if __name__ == "__main__":
    try:
        print(fetch_kernel(sys.argv[1]))
    except Exception as error:  # of the hub, of the package or of the kernel
        sys.exit(_one_line(error))
