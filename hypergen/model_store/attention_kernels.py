"""Kernels for attention backends of diffusers: fetched from the hub here, because engines use no network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

from hypergen import optional_packages
from hypergen.errors import SettingError

# Of the package `kernels`: the folders of kernels on this machine.
_VARIABLE = "LOCAL_KERNELS"


def provide_attention_kernel(
    backend: str | None, report_progress: Callable[[str], None] | None = None
) -> None:
    """Fetch the kernel of a backend whose name ends in `_hub`, for the child processes of this one.

    Does nothing where LOCAL_KERNELS is set, by the user or by a parent process.

    Raises:
        SettingError: the kernel cannot be fetched, or the package `kernels` is missing.
    """
    if backend is None or not backend.endswith("_hub") or os.environ.get(_VARIABLE):
        return
    optional_packages.require("kernels", "attention", backend)
    if report_progress is not None:
        report_progress(f"Fetching the kernel of the attention backend {backend}")
    # In a process of its own: it imports torch.
    command = [sys.executable, "-P", "-m", "hypergen.models.attention", backend]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    if done.returncode or not lines:
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        raise SettingError("attention", f"{backend} needs a kernel that cannot be fetched: {reason}")
    os.environ[_VARIABLE] = lines[-1]
