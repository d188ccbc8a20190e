"""The LoRA registry: the names and files of the LoRAs that a server offers.

The operator chooses them: single files, files in given folders, and files in the folder `loras` of the model.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from hypergen.config import EngineSettings
from hypergen.errors import InvalidRequestError, SettingError
from hypergen.model_store.diffusers_layout import LORAS

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
# The same message for every unknown name or path, so that it does not reveal whether a file exists.
NOT_OFFERED = "must name a LoRA this server offers."
_PART = r"[\w(\['!@#&~%+][\w .()+,\[\]'&!#%~@-]{0,99}"
_NAME = re.compile(rf"{_PART}(/{_PART}){{0,7}}")
# PEFT saves a folder with these two files.
_PEFT_WEIGHTS, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class LoraRegistry:
    """Names and files.

    Attributes:
        files: name -> file; the name of a file in a folder is its relative path without the extension.
        folders: real paths of folders whose files requests may also name by path.
        default: the LoRA of requests that name none.
    """

    files: dict[str, Path] = field(default_factory=dict[str, Path])
    folders: tuple[Path, ...] = ()
    default: str | None = None

    def path_of(self, name: str) -> Path:
        """The file of a name from `name_of`.

        Raises:
            InvalidRequestError: there is no such file.
        """
        path = self.files.get(name)
        if path is None and _NAME.fullmatch(name):
            candidates = (folder / f"{name}{SUFFIX}" for folder in self.folders)
            path = next((found for file in candidates if (found := _inside(file, self.folders))), None)
        if path is None:
            raise InvalidRequestError(f"A LoRA of the request {NOT_OFFERED}", param="loras")
        return path


def open_registry(settings: EngineSettings, model_folder: Path | None) -> LoraRegistry:
    """Collect the LoRAs of the settings and of the model.

    Raises:
        SettingError: a file or folder does not exist, or two LoRAs have the same name.
    """
    for setting in ("lora", "lora_dir"):
        for given in map(str, getattr(settings, setting)):
            if os.pathsep in given:  # the separator of a list in the environment
                raise SettingError(setting, f"{given}: the path must not contain '{os.pathsep}'.")
    files: dict[str, Path] = {}
    default: str | None = None
    for given in settings.lora:
        name, path = split_name(given)
        if name is None:
            if default is not None:
                raise SettingError("lora", f"{given}: only one LoRA can have no name; it is the default.")
            default = name = path.stem
        if not _NAME.fullmatch(name):
            raise SettingError("lora", f"'{name}' is not a valid name; use NAME={path}.", item=name)
        if path.is_dir():
            path = path / _PEFT_WEIGHTS
        if path.suffix != SUFFIX or not path.is_file():
            raise SettingError("lora", f"{given}: no such {SUFFIX} file.", item=name)
        _add(files, name, path)
    folders: list[Path] = []
    for given_folder in settings.lora_dir:
        folder = given_folder.expanduser()
        if not folder.is_dir():
            raise SettingError("lora_dir", f"{folder}: no such folder.")
        folders.append(folder.resolve())
        for name, path in _scan(folders[-1]).items():
            if _inside(path, (folders[-1],)):
                _add(files, name, path)
    if model_folder is not None and (model_folder / LORAS).is_dir():
        # The operator's LoRAs override those of the model. In the store, the model's files may be links.
        files = {**_scan(model_folder / LORAS), **files}
    return LoraRegistry(files, tuple(folders), default)


def split_name(given: str) -> tuple[str | None, Path]:
    """Split `NAME=PATH`; the name is None for a path alone, which may have `=` after a slash."""
    name, equals, path = given.partition("=")
    if equals and os.sep not in name and not name.startswith("."):
        return name, Path(path).expanduser()
    return None, Path(given).expanduser()


def with_absolute_path(given: str) -> str:
    """The same setting with an absolute path, for a process with another working folder."""
    name, path = split_name(given)
    return str(path.absolute()) if name is None else f"{name}={path.absolute()}"


def peft_config_file(path: Path) -> Path | None:
    """PEFT's configuration next to a LoRA file."""
    file = path.parent / _PEFT_CONFIG
    return file if file.is_file() else None


def name_of(given: str, names: tuple[str, ...], folders: tuple[str, ...]) -> str | None:
    """The name of a LoRA that a request gives by name or by a path in one of the folders; None if unknown.

    The file system is only accessed for paths that can be inside a folder.
    """
    if given in names:
        return given
    # A client must not learn whether other files exist, not even by response times.
    if "\0" in given or ".." in Path(given).parts or not given.endswith(SUFFIX) or len(given) > 4096:
        return None
    roots = tuple(Path(folder) for folder in folders)
    path = Path(given)
    candidates = [path] if path.is_absolute() else [root / path for root in roots]
    for candidate in candidates:
        found = _inside(candidate, roots)
        if found is None:
            continue
        root = next(root for root in roots if found.is_relative_to(root))
        name = found.relative_to(root).as_posix().removesuffix(SUFFIX)
        return name if _NAME.fullmatch(name) else None
    return None


def _inside(path: Path, roots: tuple[Path, ...]) -> Path | None:
    """The real path of a regular safetensors file inside one of the roots, links resolved; else None."""
    try:
        found = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        return None
    inside = any(found.is_relative_to(root) for root in roots)
    return found if inside and found.suffix == SUFFIX and found.is_file() else None


def _scan(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob(f"*{SUFFIX}")):
        name = file.relative_to(folder).as_posix().removesuffix(SUFFIX)
        if not _NAME.fullmatch(name):
            logger.warning(
                "Skipping %s: its name may only have letters, digits, spaces and ._()+-,[]'&!#%%~@", file
            )
        elif file.is_file():
            found[name] = file
    return found


def _add(files: dict[str, Path], name: str, path: Path) -> None:
    if name in files and files[name].resolve() != path.resolve():
        raise SettingError("lora", f"has two with the name {name}: {files[name]} and {path}.", item=name)
    files[name] = path
