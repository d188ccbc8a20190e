"""Check a model's tensors and configurations in a process of its own, because that needs torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hypergen.errors import ModelError


@dataclass(frozen=True)
class Report:
    """The result of `hypergen.models.check_model`.

    Attributes:
        fault: the first things that do not fit, in one line; None: the model can be loaded.
        ignored: name of a tensor that changes nothing -> why.
    """

    fault: str | None
    ignored: Mapping[str, str]


def check_in_process(folder: Path) -> Report:
    """Check a folder in diffusers' layout, which may have a single-file checkpoint; takes some seconds.

    Raises:
        ModelError: the check itself failed.
    """
    command = [sys.executable, "-m", "hypergen.models.check_model", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ModelError(f"The model cannot be checked: {reason[:300]}")
    return Report(**json.loads(lines[-1]))


def refuse_unusable(folder: Path) -> None:
    """
    Raises:
        ModelError: the model cannot be loaded.
    """
    if fault := check_in_process(folder).fault:
        raise ModelError(fault)
