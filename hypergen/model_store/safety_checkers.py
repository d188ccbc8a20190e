"""Where the content filter of --safety-checker is: a network in a folder or on the hub, or a function."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from hypergen.errors import SettingError, of_setting
from hypergen.model_store.diffusers_layout import check_component
from hypergen.model_store.hub import HUB_ID, download_safety_checker, split_revision
from hypergen.model_store.model_check import refuse_unusable_network

PROCESSOR_FILE = "preprocessor_config.json"
_CLASS = "StableDiffusionSafetyChecker"


def split_function(given: str) -> tuple[str, str] | None:
    """Module and name of `package.module:function`; None: it is a folder or a hub id."""
    module, _, function = given.partition(":")
    is_function = all(name.isidentifier() for name in (*module.split("."), function))
    return (module, function) if is_function and not os.path.exists(given) else None


def find_safety_checker(
    given: str | None, report_progress: Callable[[str], None] | None = None, *, download: bool = True
) -> str | None:
    """The same function, or the absolute folder of the network, downloaded if necessary.

    Args:
        download: False: return a hub id as it is.

    Raises:
        SettingError: there is no such module, the folder is not complete, or cannot be downloaded.
    """
    if given is None:
        return None
    if function := split_function(given):
        _check_module(given, function[0])
        return given
    path = Path(os.path.expanduser(given)).absolute()
    repo, revision = split_revision(given)
    if not path.is_dir() and HUB_ID.fullmatch(repo):
        if not download:
            return given
        if report_progress is not None:
            report_progress(f"Looking for {given} in the hub's cache and on the hub")
        check = partial(refuse_unusable_network, class_name=_CLASS)
        with of_setting("safety_checker", given):
            path = download_safety_checker(repo, revision, check)
    if not path.is_dir():
        raise SettingError("safety_checker", f"{given}: no such folder, hub id or module:function.")
    network, _ = folders_of(path)
    with of_setting("safety_checker", given):
        check_component(network.parent, network.name, _CLASS)
    return str(path)


def folders_of(path: Path) -> tuple[Path, Path]:
    """The folders of the network and of its image processor: both `path`, or parts of a model in `path`.

    Raises:
        SettingError: one of them is missing.
    """
    network = path / "safety_checker" if (path / "safety_checker").is_dir() else path
    for processor in (network, network.parent / "feature_extractor"):
        if (processor / PROCESSOR_FILE).is_file():
            return network, processor
    raise SettingError(
        "safety_checker", f"{path} has no {PROCESSOR_FILE}, nor has a folder feature_extractor."
    )


def _check_module(given: str, module: str) -> None:
    try:
        found = find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        found = False
    except Exception as error:  # whatever the operator's package raises at its import
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SettingError("safety_checker", f"{given} cannot be imported: {reason[:300]}.") from None
    if not found:
        raise SettingError(
            "safety_checker",
            f"{given}: no module {module}; install it, or name its folder in PYTHONPATH.",
        )
