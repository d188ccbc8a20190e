"""Registry: which LoRAs a server offers, by name, and which file each is. It reads headers, no tensors.

The operator decides which LoRAs exist: files given one by one, files below given folders, and those in the
folder `loras` of the model itself.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypergen.config import EngineSettings
from hypergen.errors import ConfigurationError, InvalidRequestError, ModelError
from hypergen.model_store.diffusers_layout import LORAS, safetensors_header

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
# In every answer to a name or path that is not offered, so that none tells whether a file is there.
NOT_OFFERED = "must name a LoRA this server offers."
_NAME = re.compile(r"\w[\w .()+-]{0,99}(/\w[\w .()+-]{0,99}){0,7}")


@dataclass(frozen=True)
class LoraRegistry:
    """Names and files.

    Attributes:
        files: name -> file; names of files in folders are their paths there, without the ending.
        folders: whose files requests may also give by path, real paths.
        default: what requests get that name no LoRA.
    """

    files: dict[str, Path] = field(default_factory=dict[str, Path])
    folders: tuple[Path, ...] = ()
    default: str | None = None

    def path_of(self, name: str) -> Path:
        """The file of a name that `name_of` gave.

        Raises:
            InvalidRequestError: there is none.
        """
        path = self.files.get(name)
        if path is None and _NAME.fullmatch(name):
            candidates = (folder / f"{name}{SUFFIX}" for folder in self.folders)
            path = next((found for file in candidates if (found := _inside(file, self.folders))), None)
        if path is None:
            raise InvalidRequestError(f"A LoRA of the request {NOT_OFFERED}", param="loras")
        return path


def open_registry(settings: EngineSettings, model_folder: Path | None) -> LoraRegistry:
    """Look for everything that the settings and the model offer.

    Raises:
        ConfigurationError: a file or folder is not there, or two LoRAs have one name.
    """
    for given in (*settings.lora, *map(str, settings.lora_dir)):
        if os.pathsep in given:  # which separates them in the environment
            raise ConfigurationError(f"The path of a LoRA must not hold '{os.pathsep}': {given}.")
    files: dict[str, Path] = {}
    default: str | None = None
    for given in settings.lora:
        name, path = split_name(given)
        if name is None:
            if default is not None:
                raise ConfigurationError("Only one LoRA can be without a name: it is the server's default.")
            default = name = path.stem
        if not _NAME.fullmatch(name):
            raise ConfigurationError(f"'{name}' is no name for a LoRA; give --lora NAME={path}.")
        if path.suffix != SUFFIX or not path.is_file():
            raise ConfigurationError(f"--lora {given}: there is no such {SUFFIX} file.")
        _add(files, name, path)
    folders: list[Path] = []
    for given_folder in settings.lora_dir:
        folder = given_folder.expanduser()
        if not folder.is_dir():
            raise ConfigurationError(f"--lora-dir {folder}: there is no such folder.")
        folders.append(folder.resolve())
        for name, path in _scan(folders[-1]).items():
            if _inside(path, (folders[-1],)):
                _add(files, name, path)
    if model_folder is not None and (model_folder / LORAS).is_dir():
        # What the operator gave wins over what came with the model. Files of a model in the store may be
        # links to where they lie.
        files = {**_scan(model_folder / LORAS), **files}
    return LoraRegistry(files, tuple(folders), default)


def split_name(given: str) -> tuple[str | None, Path]:
    """`NAME=PATH`, or a path alone; a path with a slash before its first `=` has no name."""
    name, equals, path = given.partition("=")
    if equals and os.sep not in name and not name.startswith("."):
        return name, Path(path).expanduser()
    return None, Path(given).expanduser()


def with_absolute_path(given: str) -> str:
    """The same for a process with another working folder."""
    name, path = split_name(given)
    return str(path.absolute()) if name is None else f"{name}={path.absolute()}"


def name_of(given: str, names: tuple[str, ...], folders: tuple[str, ...]) -> str | None:
    """The name of a LoRA that a request gives by name or by a path inside one of the folders; None: neither.

    Looks at the file system only where the text alone says that it lies inside a folder.
    """
    if given in names:
        return given
    # Whether something is elsewhere must not show, not even in how long the answer takes.
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
    """The real path of a regular safetensors file inside a folder, links resolved; else None."""
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
            logger.warning("%s is left out: rename the file to letters, digits, spaces and ._()+-.", file)
        elif file.is_file():
            found[name] = file
    return found


def _add(files: dict[str, Path], name: str, path: Path) -> None:
    if name in files and files[name].resolve() != path.resolve():
        raise ConfigurationError(f"Two LoRAs are called {name}: {files[name]} and {path}.")
    files[name] = path


@dataclass(frozen=True)
class LoraSummary:
    """What the header of a LoRA file tells: `hypergen loras` shows it."""

    model: str
    layout: str
    ranks: tuple[int, ...]
    size_bytes: int


def summarise(path: Path) -> LoraSummary:
    """Read a file's header.

    Raises:
        ModelError: the file is damaged.
    """
    tensors: dict[str, Any] = json.loads(safetensors_header(path, path.parent.name, path.name))
    shapes = {key: tensor["shape"] for key, tensor in tensors.items() if key != "__metadata__"}
    downs = {
        key: shape
        for key, shape in shapes.items()
        if any(part in key for part in (".lora_A.", ".lora_down.", ".lora.down.", "_lora.down."))
    }
    if not downs:
        raise ModelError(f"{path.name} holds no LoRA.")
    kohya = any(key.startswith(("lora_unet_", "lora_te")) for key in downs)
    ranks = tuple(sorted({shape[0] for shape in downs.values() if shape}))
    return LoraSummary(_model(downs), "kohya" if kohya else "diffusers", ranks, path.stat().st_size)


def _model(downs: dict[str, list[int]]) -> str:
    """The family that the layers belong to, by their names and the width of the text they attend to."""
    if any(
        "single_blocks" in key or "double_blocks" in key or "single_transformer_blocks" in key
        for key in downs
    ):
        return "flux"
    widths = {shape[1] for key, shape in downs.items() if "attn2" in key and "to_k" in key.replace(".", "_")}
    if widths:
        return {768: "sd 1.x", 1024: "sd 2.x", 2048: "sdxl"}.get(max(widths), "sd")
    if any("joint" in key or "add_k_proj" in key for key in downs):
        return "sd3"
    if any(key.startswith(("unet", "lora_unet")) for key in downs):
        return "sd or sdxl"
    return "transformer" if any(key.startswith("transformer") for key in downs) else "text encoder"
