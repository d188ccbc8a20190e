"""The configuration of each served model, as in the served-model files in configs/."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, BeforeValidator, Field, field_validator

from hypergen import sampler_names

_ENDINGS = (".yaml", ".yml")
_PACKAGE = Path(__file__).resolve().parent
# In an installed wheel and in a clone.
_SHIPPED = (_PACKAGE / "bento" / "configs", _PACKAGE.parent / "configs")


def _read_pairs(value: Any) -> Any:
    """Parse the value of flags (a list of NAME=SOURCE) or the environment (one text, with commas)."""
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, (list, tuple)):
        pairs = [str(entry).partition("=") for entry in cast(Sequence[Any], value)]
        value = {name.strip(): source.strip() for name, _, source in pairs}
        if len(value) < len(pairs):
            raise ValueError("must not have a name twice")
    if isinstance(value, Mapping):
        value = cast(Mapping[Any, Any], value)
        for name, source in value.items():
            if not (name and source) or "," in f"{name}{source}":
                raise ValueError("must be NAME=SOURCE, without commas")
    return value


NamedSources = Annotated[dict[str, str], BeforeValidator(_read_pairs)]


class ModelDefaultsEntry(BaseModel, frozen=True, extra="forbid"):
    """Values of omitted request fields; None means the family's default."""

    num_inference_steps: int | None = Field(None, ge=1, le=150)
    guidance_scale: float | None = Field(None, ge=1, le=20, allow_inf_nan=False)
    width: int | None = Field(None, ge=64, le=8192, multiple_of=8)  # pixels
    height: int | None = Field(None, ge=64, le=8192, multiple_of=8)  # pixels


class ModelOptions(BaseModel, frozen=True, extra="forbid"):
    """Properties of a model that its files may not state; None means what they state.

    Attributes:
        prediction_type: what the denoiser predicts.
        zero_terminal_snr: the model was trained with zero terminal SNR; the spacing is then trailing by
            default.
        timestep_spacing: how the timesteps of a request are spread over those of the training.
        scheduler: name of the sampler of requests that name none.
        clip_skip: the hidden layer of CLIP whose output is the embedding, counted from the last one, which
            is 1; for requests that choose none.
        vae: folder, hub id or .safetensors file of another VAE.
    """

    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    zero_terminal_snr: bool | None = None
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None
    scheduler: str | None = None
    clip_skip: int | None = Field(default=None, ge=1, le=12)
    vae: str | None = None

    def overridden_by(self, other: ModelOptions) -> ModelOptions:
        """These options, with those that `other` has."""
        return self.model_copy(update=other.model_dump(exclude_none=True))


class ModelEntry(ModelOptions, frozen=True, extra="forbid"):
    """One model to serve. These settings apply to this model alone.

    Attributes:
        source: hub id, folder or tag of the model store; None is the embedded model.
        revision: branch, tag or commit of a hub model.
        single_file_config: as in `Settings`.
        name: id in /v1/models; None means `source`.
        aliases: other names for requests.
        loras: name -> file. A name without a file is a placeholder and is not offered.
        controlnet: name -> folder or hub id of a ControlNet.
        embeddings: name in prompts -> file of a textual inversion.
        refiner: for an SDXL model: hub id, folder, checkpoint file or tag of the store.
    """

    source: str | None = None
    revision: str | None = None
    single_file_config: str | None = None
    name: str | None = None
    aliases: tuple[str, ...] = ()
    defaults: ModelDefaultsEntry = Field(default_factory=lambda: ModelDefaultsEntry.model_validate({}))
    loras: dict[str, str | None] = Field(default_factory=dict[str, str | None])
    controlnet: NamedSources = Field(default_factory=dict[str, str])
    embeddings: NamedSources = Field(default_factory=dict[str, str])
    refiner: str | None = None

    @field_validator("scheduler")
    @classmethod
    def _check_sampler(cls, name: str | None) -> str | None:
        if name is not None:
            sampler_names.check_name(name)
        return name

    @property
    def options(self) -> ModelOptions:
        return ModelOptions.model_validate({name: getattr(self, name) for name in ModelOptions.model_fields})


def is_model_file(given: str) -> bool:
    """Whether this is the path of a served-model file, by its extension."""
    return given.endswith(_ENDINGS)


def read_entries(value: Any) -> Any:
    """Parse entries from a file (a list or one text), the environment (one text) or flags, for pydantic.

    An entry is a mapping, a served-model file, or a model's source. In the environment they are separated by
    commas, or are JSON.

    Raises:
        ValueError: a served-model file cannot be read. The message is one line.
    """
    entries = _split_entries(value)
    if not isinstance(entries, (list, tuple)):
        return entries
    return [_read_entry(entry) for entry in cast(Sequence[Any], entries)]


def file_of_entry(value: Any, index: int) -> Path | None:
    """The served-model file of an entry; None if the entry is no file.

    Args:
        value: as for `read_entries`.
    """
    entry = _split_entries(value)[index]
    return _find_file(entry.strip()) if isinstance(entry, str) and is_model_file(entry.strip()) else None


def _split_entries(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return json.loads(value) if value.lstrip().startswith("[") else value.split(",")


def as_json(entries: Sequence[ModelEntry]) -> str:
    """Entries as one text for the environment."""
    return json.dumps([entry.model_dump(exclude_defaults=True) for entry in entries])


def _read_entry(entry: Any) -> Any:
    if not isinstance(entry, str):
        return entry
    entry = entry.strip()
    return _read_file(_find_file(entry)) if is_model_file(entry) else {"source": entry}


def _find_file(given: str) -> Path:
    """The file itself, else the shipped one of this name."""
    file = Path(given).expanduser()
    shipped = next((folder / given for folder in _SHIPPED if (folder / given).is_file()), None)
    return file if file.exists() or file.name != given or shipped is None else shipped


def _read_file(file: Path) -> Any:
    """Read a served-model file; paths in it are relative to its folder."""
    try:
        tree: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the served-model file {file} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(explain_yaml(file, error)) from None
    if not isinstance(tree, dict):
        raise ValueError(f"the served-model file {file} must be a mapping of names to values")
    tree = cast(dict[str, Any], tree)
    folder = file.resolve().parent
    for name in ("source", "single_file_config", "refiner", "vae"):
        if isinstance(tree.get(name), str):
            tree[name] = _from_folder(folder, tree[name])
    for name in ("loras", "embeddings", "controlnet"):
        if isinstance(tree.get(name), dict):
            sources = cast(dict[str, Any], tree[name])
            tree[name] = dict(_from_folders(folder, sources, always=name != "controlnet"))
    return tree


def explain_yaml(file: Path, error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """One line: where and why a file is not YAML."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"{file} is not YAML: {' '.join(str(error).split())}"
    return f"{file}, line {error.problem_mark.line + 1}, is not YAML: {error.problem}"


def _from_folders(folder: Path, sources: dict[str, Any], *, always: bool) -> Iterator[tuple[str, Any]]:
    for name, source in sources.items():
        if isinstance(source, str) and source:
            yield name, str(folder / Path(source).expanduser()) if always else _from_folder(folder, source)
        else:
            yield name, source


def _from_folder(folder: Path, source: str) -> str:
    """A relative path as an absolute one. Without a dot in front, it is a hub id unless it exists."""
    if source.startswith("~"):
        return source
    is_path = source.startswith(("./", "../")) or source.endswith(".safetensors")
    return str(folder / source) if is_path or (source and (folder / source).exists()) else source


def as_text(value: object, separator: str = os.pathsep) -> str:
    """A setting as the value of an environment variable.

    Args:
        separator: between the items of a list.
    """
    if isinstance(value, Mapping):
        return ",".join(f"{name}={source}" for name, source in cast(Mapping[str, str], value).items())
    if isinstance(value, tuple):
        return separator.join(map(str, cast(tuple[Any, ...], value)))
    return str(value)
