"""Model folders in diffusers layout, without torch: file selection, and checks of completeness and safety."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hypergen.errors import ModelError
from hypergen.model_families import PIPELINES, optional_encoders
from hypergen.model_store.checkpoint_detection import read_checkpoint
from hypergen.model_store.pipeline_arguments import image_argument

PIPELINE_FILE = "model_index.json"
# Weights of several components in one file; its folder has everything else. See `single_file.py`.
CHECKPOINT = "checkpoint.safetensors"
LIBRARIES = ("diffusers", "transformers")
LORAS = "loras"  # the folder of LoRA files that belong to the model
OPTIONAL = "safety_checker"  # never loaded, and often deleted from downloads
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack"}

_TOP_LEVEL_FILES = re.compile(r"model_index\.json|hypergen\.json|README\.md|LICENSE[\w-]*(\.md|\.txt)?")
# `vae`, `text_encoder_2`: a name that cannot lead out of the model's folder.
_COMPONENT = re.compile(r"[A-Za-z0-9_]+")
_WEIGHTLESS = re.compile(r".*(Scheduler|Tokenizer|TokenizerFast|Processor|ProcessorFast|FeatureExtractor)")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_INDEX = re.compile(r"([^.]+)\.safetensors(?:\.(?P<legacy>\w+))?\.index(?:\.(?P<variant>\w+))?\.json")


@dataclass(frozen=True)
class Selection:
    """The files of a model to store.

    Args:
        files: stored name -> name in the source, both relative to the model's folder.
        fp16: fp16 variants: "taken", "left" (they exist but are not selected) or "none".
    """

    files: dict[str, str]
    fp16: str

    def without_weights(self, components: Collection[str] | None = None) -> Selection:
        """A selection without the weights of these components; None: of all."""
        files = {
            stored: name
            for stored, name in self.files.items()
            if not (stored.endswith(".safetensors") or ".index." in stored)
            or (components is not None and stored.partition("/")[0] not in components)
        }
        return replace(self, files=files)


def read_components(pipeline_file: Path, model: str) -> dict[str, str]:
    """Component -> class name, without null components.

    Models with custom code are refused: those with a list as `_class_name`, or with another library than
    diffusers and transformers. SD 1.x gives `stable_diffusion` as the library of its safety checker, which is
    a module of diffusers.

    Raises:
        ModelError: the file is missing, damaged or names custom code.
    """
    index = read_json(pipeline_file, model, PIPELINE_FILE)
    if not isinstance(index.get("_class_name"), str):
        raise ModelError(
            f"{model}: _class_name in {PIPELINE_FILE} must be a class name, not {index.get('_class_name')!r}."
        )
    components: dict[str, str] = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[:1] == [None]:
            continue
        match entry:
            case [str(library), str(class_name)] if _COMPONENT.fullmatch(name):
                is_safety_checker = (library, class_name) == (
                    "stable_diffusion",
                    "StableDiffusionSafetyChecker",
                )
                if library not in LIBRARIES and not is_safety_checker:
                    raise ModelError(
                        f"{model}: {name} is from library '{library}'; only {' and '.join(LIBRARIES)} are "
                        "supported."
                    )
                components[name] = class_name
            case _:
                raise ModelError(
                    f"{model}: {name!r} in {PIPELINE_FILE} must be [library, class]; it is {entry!r}."
                )
    return components


def pipeline_class_of(folder: Path, model: str) -> str:
    return str(read_json(folder / PIPELINE_FILE, model, PIPELINE_FILE).get("_class_name"))


def require_pipeline(model: str, pipelines: Collection[str] | None, pipeline_file: Path) -> None:
    """Refuse a pipeline class that is not in `pipelines`; None accepts all."""
    pipeline = pipeline_class_of(pipeline_file.parent, model)
    if pipelines is not None and pipeline not in pipelines:
        raise ModelError(f"{model} is a {pipeline}, which the installed diffusers does not have.")
    if pipelines is not None and pipeline not in PIPELINES and (name := image_argument(pipeline)):
        raise ModelError(
            f"{model} is a {pipeline}, which cannot generate from a prompt alone: it needs '{name}'."
        )


def select_files(names: Iterable[str], components: Iterable[str], *, prefer_fp16: bool) -> Selection:
    """Select the files to store: configurations, vocabularies and one set of weights per component.

    If a component has both `.fp16.` and plain weights, `prefer_fp16` decides. fp16 files are stored without
    the variant in their name, because `from_pretrained` expects `variant="fp16"` for every component or none.
    Shards keep their names, which are in the index.
    """
    names = list(names)
    files = {name: name for name in names if _TOP_LEVEL_FILES.fullmatch(name)}
    fp16_taken = fp16_left = False
    for component in components:
        inside = [n.partition("/")[2] for n in names if n.startswith(f"{component}/") and n.count("/") == 1]
        variants = {n: _variant(n) for n in inside}
        has_fp16 = any(v == "fp16" and n.endswith(".safetensors") for n, v in variants.items())
        has_plain = any(v == "" and n.endswith(".safetensors") for n, v in variants.items())
        selected = "fp16" if has_fp16 and (prefer_fp16 or not has_plain) else ""
        fp16_taken |= selected == "fp16"
        fp16_left |= has_fp16 and selected == ""
        for name, variant in variants.items():
            is_config = Path(name).suffix in {".json", ".txt", ".model"} and ".index." not in name
            if is_config or variant == selected:
                stored = name if is_config else _plain_name(name)
                files[f"{component}/{stored}"] = f"{component}/{name}"
    return Selection(files, "taken" if fp16_taken else "left" if fp16_left else "none")


def require_weights(model: str, component: str, class_name: str, names: Iterable[str]) -> None:
    """Refuse a component that needs weights and has no safetensors file.

    Args:
        names: the component's files.
    """
    suffixes = {Path(name).suffix for name in names}
    if component == OPTIONAL or _WEIGHTLESS.fullmatch(class_name) or ".safetensors" in suffixes:
        return
    has = (
        "only pickle weights; only safetensors are loaded" if suffixes & PICKLES else "no safetensors weights"
    )
    raise ModelError(f"{model}: {component} has {has}.")


def variant_of(folder: Path) -> str | None:
    """diffusers' name of the weights in a network's folder: "fp16" if there are no others."""
    names = [file.name for file in folder.glob("*.safetensors")]
    return "fp16" if names and all(".fp16" in name for name in names) else None


def select_in_folder(folder: Path, *, prefer_fp16: bool) -> Selection:
    """`select_files` for a local folder, with the model's LoRAs."""
    components = read_components(folder / PIPELINE_FILE, str(folder))
    names = [file.name for file in folder.iterdir() if file.is_file()]
    for component in components:
        names += [f"{component}/{file.name}" for file in (folder / component).glob("*") if file.is_file()]
    selection = select_files(sorted(names), components, prefer_fp16=prefer_fp16)
    loras = {f"{LORAS}/{file.name}" for file in (folder / LORAS).glob("*.safetensors") if file.is_file()}
    return replace(selection, files={**selection.files, **{name: name for name in sorted(loras)}})


def missing_components(folder: Path, in_checkpoint: Collection[str]) -> list[str]:
    """Components whose weights are neither in the checkpoint nor in the folder."""
    optional = optional_encoders(pipeline_class_of(folder, str(folder)))
    return [
        name
        for name, class_name in read_components(folder / PIPELINE_FILE, str(folder)).items()
        if name not in (OPTIONAL, *optional, *in_checkpoint)
        and not _WEIGHTLESS.fullmatch(class_name)
        and not any((folder / name).glob("*.safetensors"))
    ]


def digest(folder: Path, selection: Selection, *, of_contents: bool) -> str:
    """A hash of the selected files, 12 hex digits.

    Args:
        of_contents: hash the contents; otherwise names, sizes, times and headers, because weights are large.
    """
    file_hash = hashlib.sha256()
    for stored, name in sorted(selection.files.items()):
        file = folder / name
        file_hash.update(f"{stored}\0{name}\0".encode())
        if of_contents:
            file_hash.update(hashlib.sha256(file.read_bytes()).digest())
            continue
        stat = file.stat()
        file_hash.update(f"{stat.st_size} {stat.st_mtime_ns}\0".encode())
        if file.suffix == ".safetensors":
            file_hash.update(safetensors_header(file, str(folder), name))
    return file_hash.hexdigest()[:12]


def check_folder(path: Path) -> None:
    """Check that a folder is a complete model without custom code.

    It reads configurations and safetensors headers, never weights, so it takes milliseconds.

    Raises:
        ModelError: one line with folder and file.
    """
    if not path.is_dir():
        raise ModelError(f"No such folder: {path}")
    if not (path / PIPELINE_FILE).is_file():
        raise ModelError(f"{path} has no {PIPELINE_FILE}: HyperGen serves folders in diffusers layout.")
    in_checkpoint = components_in_checkpoint(path)
    optional = optional_encoders(pipeline_class_of(path, str(path))) if in_checkpoint else {}
    for name, class_name in read_components(path / PIPELINE_FILE, str(path)).items():
        if name not in (*optional, *in_checkpoint):
            check_component(path, name, class_name)


def components_in_checkpoint(path: Path) -> frozenset[str]:
    """Components whose weights are in the model's checkpoint file; empty for most models."""
    file = path / CHECKPOINT
    if not file.is_file():
        return frozenset()
    return frozenset(read_checkpoint(safetensors_header(file, str(path), file.name), CHECKPOINT).components)


def safetensors_header(file: Path, model: str, name: str) -> bytes:
    """The bytes of the JSON header, after checking the tensors' offsets, sizes and dtypes.

    Raises:
        ModelError: the file is damaged or a Git LFS pointer.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":  # "version https://git-lfs.github.com/spec/v1"
            raise ModelError(f"{model}: {name} is a Git LFS pointer, not weights: run `git lfs pull` there.")
        if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ModelError(f"{model}: {name} is damaged: its header does not fit into its {size} bytes.")
        header = stream.read(length)
    try:
        tensors: dict[str, Any] = json.loads(header)
        ends = [int(tensor["data_offsets"][1]) for key, tensor in tensors.items() if key != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ModelError(f"{model}: {name} is damaged: its header cannot be read.") from None
    if (expected := 8 + length + max(ends, default=0)) != size:
        raise ModelError(f"{model}: {name} is damaged: it should have {expected} bytes and has {size}.")
    try:
        with safe_open(file, framework="np"):
            return header
    except SafetensorError as error:
        raise ModelError(f"{model}: {name} is damaged: {error}.") from None


def check_component(model: Path, name: str, class_name: str) -> None:
    """`check_folder` for one component of a model."""
    folder = model / name
    if not folder.is_dir() and name != OPTIONAL:
        raise ModelError(f"{model}: {PIPELINE_FILE} names '{name}', but there is no such folder.")
    require_weights(str(model), name, class_name, [file.name for file in folder.glob("*")])
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        return
    read_json(folder / "config.json", str(model), f"{name}/config.json")
    indices = [file for file in sorted(folder.iterdir()) if _INDEX.fullmatch(file.name)]
    if not indices and all(_SHARD.search(file.name) for file in weights):
        raise ModelError(f"{model}: {name} has shards of weights without their safetensors.index.json.")
    for index in indices:
        _check_shards(model, index)
    for file in weights:
        safetensors_header(file, str(model), f"{name}/{file.name}")


def _check_shards(model: Path, index: Path) -> None:
    name = f"{index.parent.name}/{index.name}"
    weight_map = read_json(index, str(model), name).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(f"{model}: {name} has no weight_map.")
    for shard in sorted({str(shard) for shard in weight_map.values()}):
        if "/" in shard or "\\" in shard or not (index.parent / shard).is_file():
            raise ModelError(f"{model}: {name} names '{shard}', but its folder has no such file.")


def read_json(file: Path, model: str, name: str) -> dict[str, Any]:
    """A file of a model; `name` is the file's in messages."""
    try:
        content = json.loads(file.read_bytes())
    except OSError:
        raise ModelError(f"{model}: {name} is missing or cannot be read.") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{model}: {name} is damaged: it is not JSON.") from None
    if not isinstance(content, dict):
        raise ModelError(f"{model}: {name} is damaged: it must be a JSON object.")
    return content


def _variant(name: str) -> str | None:
    """The variant of a safetensors file or index, "" without one, such as "fp16"; None for other files."""
    if match := _INDEX.fullmatch(name):
        return match["legacy"] or match["variant"] or ""
    if not name.endswith(".safetensors"):
        return None
    return _SHARD.sub("", name.removesuffix(".safetensors")).partition(".")[2]


def _plain_name(name: str) -> str:
    if match := _INDEX.fullmatch(name):
        return f"{match[1]}.safetensors.index.json"
    return name if _SHARD.search(name) else f"{name.partition('.')[0]}.safetensors"
