"""VAEs, ControlNets and textual inversions beside a model: from what the settings name to files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from hypergen.errors import SettingError, of_setting
from hypergen.model_store.diffusers_layout import check_component
from hypergen.model_store.hub import HUB_ID, download_network, split_revision
from hypergen.model_store.model_check import refuse_unusable_network

_EMBEDDING_SUFFIXES = (".safetensors", ".pt", ".bin")


def find_vae(given: str | None, model: Path | None = None) -> str | None:
    """The absolute path of a VAE: a folder, a .safetensors file, or a hub model, which is downloaded.

    Args:
        model: the folder of the model that it is for.

    Raises:
        SettingError: it does not exist, has no safetensors weights, or is a hub model that cannot be used.
    """
    if given is None:
        return None
    with of_setting("vae"):
        return _find_vae(given, model)


def _find_vae(given: str, model: Path | None) -> str:
    path = Path(os.path.expanduser(given)).resolve()
    if path.is_file() and path.suffix == ".safetensors":
        return str(path)
    source, revision = split_revision(given)
    if not path.is_dir() and HUB_ID.fullmatch(source):
        check = partial(refuse_unusable_network, class_name="AutoencoderKL", model=model)
        path = download_network(source, revision, check)
    if not path.is_dir():
        raise SettingError("vae", f"{given}: no such folder or .safetensors file.")
    check_component(path.parent, path.name, "AutoencoderKL")
    return str(path)


def find_controlnets(sources: Mapping[str, str]) -> dict[str, str]:
    """The same sources with absolute folders. Hub ids, with or without @REVISION, are unchanged.

    Raises:
        SettingError: a folder does not exist, or is not a complete ControlNet with safetensors weights.
    """
    found: dict[str, str] = {}
    for name, source in sources.items():
        path = Path(os.path.expanduser(source)).resolve()
        if path.is_dir():
            with of_setting("controlnet", f"'{name}'", item=name):
                check_component(path.parent, path.name, "ControlNetModel")
            found[name] = str(path)
        elif HUB_ID.fullmatch(split_revision(source)[0]):
            found[name] = source
        else:
            raise SettingError("controlnet", f"'{name}': no such folder: {source}", item=name)
    return found


def download_controlnets(
    sources: Mapping[str, str],
    model: Path,
    report_progress: Callable[[str], None] | None,
    *,
    prefer_fp16: bool = False,
) -> dict[str, str]:
    """The folders of the ControlNets of a model, downloaded if necessary.

    Args:
        sources: from `find_controlnets`.
        prefer_fp16: see `download_network`.

    Raises:
        SettingError: one cannot be downloaded, or is for another model.
    """
    folders: dict[str, str] = {}
    check = partial(refuse_unusable_network, class_name="ControlNetModel", model=model)
    for name, source in sources.items():
        if os.path.isabs(source):
            folders[name] = source
            continue
        if report_progress is not None:
            report_progress(f"Looking for {source} in the hub's cache and on the hub")
        with of_setting("controlnet", f"'{name}' ({source})", item=name):
            folder = download_network(*split_revision(source), check, prefer_fp16=prefer_fp16)
            folders[name] = str(folder)
    return folders


def find_embeddings(files: Mapping[str, str]) -> dict[str, str]:
    """The same files of textual inversions with absolute paths.

    Raises:
        SettingError: a file does not exist or has another extension, or a name differs from another one
            by case alone.
    """
    found: dict[str, str] = {}
    for name, given in files.items():
        path = Path(given).expanduser().absolute()
        if path.suffix not in _EMBEDDING_SUFFIXES or not path.is_file():
            suffixes = " or ".join(_EMBEDDING_SUFFIXES)
            raise SettingError("embedding", f"'{name}': no such {suffixes} file: {given}", item=name)
        if name.casefold() in map(str.casefold, found):
            raise SettingError("embedding", f"has the name '{name}' twice; change one of them.", item=name)
        found[name] = str(path)
    return found
