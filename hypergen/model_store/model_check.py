"""Check a model's tensors and configurations in a process of its own, because that needs torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hypergen.config import EngineSettings
from hypergen.errors import ModelError, SettingError
from hypergen.served_model_config import ModelOptions

# Settings that may not fit a model or a device, see `hypergen.models.check_arguments`.
_CHECKED = {
    "attention",
    "compile",
    "controlnet",
    "device",
    "devices",
    "embedding",
    "offload",
    "quantization",
    "vae_tiling",
}


@dataclass(frozen=True)
class Report:
    """The result of `hypergen.models.check_model`.

    Attributes:
        fault: the first things that do not fit, in one line; None: the model can be loaded.
        ignored: name of a tensor that changes nothing -> why.
        setting, item: of a `SettingError`, whose reason is the fault.
    """

    fault: str | None
    ignored: Mapping[str, str]
    setting: str | None = None
    item: str | None = None

    def refuse(self) -> None:
        """
        Raises:
            ModelError: there is a fault.
            SettingError: it is one of the settings.
        """
        if self.fault and self.setting:
            raise SettingError(self.setting, self.fault, item=self.item)
        if self.fault:
            raise ModelError(self.fault)


def check_in_process(
    folder: Path, options: ModelOptions | None = None, settings: EngineSettings | None = None
) -> Report:
    """Check a folder in diffusers' layout, which may have a single-file checkpoint; takes some seconds.

    Components without weights are not checked: their weights may not be downloaded yet.

    Args:
        options: of its served-model file; its VAE is a path.
        settings: of the engine; ControlNets of the hub are not checked.

    Raises:
        ModelError: the check itself failed.
    """
    given = (options or ModelOptions()).model_dump_json(exclude_none=True)
    chosen = settings.model_dump_json(include=_CHECKED, exclude_defaults=True) if settings else "{}"
    return _run("hypergen.models.check_model", str(folder), given, chosen)


def refuse_unusable(
    folder: Path, options: ModelOptions | None = None, settings: EngineSettings | None = None
) -> None:
    """
    Raises:
        ModelError: the model cannot be loaded.
        SettingError: it cannot be loaded with these options or settings.
    """
    check_in_process(folder, options, settings).refuse()


def refuse_unusable_network(folder: Path, class_name: str, model: Path | None = None) -> None:
    """Check one network in a folder, whose weights may be headers alone.

    Args:
        class_name: see `hypergen.models.check_network`.
        model: the folder of the model that it is for.

    Raises:
        ModelError: it cannot be loaded.
    """
    arguments = [class_name, str(folder), *([str(model)] if model else [])]
    _run("hypergen.models.check_network", *arguments).refuse()


def refuse_unusable_loras(model: Path, max_mb: float, files: Mapping[str, Path]) -> None:
    """
    Args:
        model: its folder.
        files: name of a request -> file.

    Raises:
        SettingError: a LoRA cannot be applied to the model.
    """
    pairs = [f"{name}={file}" for name, file in files.items()]
    _run("hypergen.models.check_loras", str(model), str(max_mb * 1e6), *pairs).refuse()


def _run(module: str, *arguments: str) -> Report:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ModelError(f"The model cannot be checked: {reason[:300]}")
    return Report(**json.loads(lines[-1]))
