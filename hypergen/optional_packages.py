"""Packages that only some settings need. Their extras are of this repository, and on no package index."""

from __future__ import annotations

from importlib.util import find_spec

from hypergen.errors import SettingError

# Module -> what `pip install` takes, and the extra of a clone that has it.
_PACKAGES = {
    "c2pa": ("c2pa-python", "c2pa"),
    "kernels": ("kernels", None),
    "matplotlib": ("matplotlib", "bench"),
    "obstore": ("'obstore>=0.12'", "s3"),
    "redis": ("'redis>=8'", "redis"),
    "torchao": ("'torchao>=0.18'", "quantization"),
}


def require(module: str, setting: str, value: str = "") -> None:
    """
    Args:
        setting: what needs the package; with `value` if some values do not.

    Raises:
        SettingError: the package is not installed.
    """
    if find_spec(module) is not None:
        return
    requirement, extra = _PACKAGES[module]
    in_a_clone = f", or in a clone pip install -e '.[{extra}]'" if extra else ""
    needs = f"{value} needs" if value else "needs"
    raise SettingError(setting, f"{needs} the package {module}: pip install {requirement}{in_a_clone}.")
