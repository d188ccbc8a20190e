"""Settings: read once from a file, the environment and flags, then frozen and passed on by argument.

A setting is a field with a description. Its flag and its environment name follow from the field:
`queue_timeout_s` is `--queue-timeout` and `HYPERGEN_QUEUE_TIMEOUT`. The unit stays in the field's name and
description.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from hypergen.errors import ConfigurationError
from hypergen.named_sources import NamedSources, as_text

PREFIX = "HYPERGEN_"
# Kubernetes announces a service called "hypergen" to every pod with names like these; they are not ours.
_KUBERNETES_NAME = re.compile(r"HYPERGEN_(SERVICE_|PORT_)")

Device = Literal["cuda", "cpu", "mps"]
Dtype = Literal["float16", "bfloat16", "float32"]
Determinism = Literal["strict", "fast"]
Compile = Literal["off", "on", "graphs"]
Attention = Literal["flash", "cudnn", "efficient", "math"]


class EngineSettings(BaseModel, frozen=True, extra="forbid"):
    """How an engine process uses its accelerator."""

    device: Device | None = Field(
        None, description="where the model runs; absent: cuda, mps or cpu, the first there is"
    )
    dtype: Dtype | None = Field(
        None, description="precision of the weights; absent: chosen for model and device"
    )
    refiner: Path | None = Field(
        None, description="folder of the SDXL refiner that draws the last steps of requests that enable it"
    )
    max_batch_size: int = Field(8, ge=1, le=256, description="images per denoising step")
    determinism: Determinism = Field(
        "strict",
        description="strict: the same seed gives the same bytes, whatever shares the batch; "
        "fast: without that promise, and without the layers and lone passes that it takes",
    )
    aging: float = Field(
        0.2,
        ge=0,
        le=10,
        allow_inf_nan=False,
        description="how much a waiting image gains on shorter ones, in seconds of work per second of wait; "
        "0: the shortest always goes first",
    )
    prompt_cache_mb: int = Field(
        512, ge=0, description="memory for prompt embeddings, in MB; 0 turns the cache off"
    )
    max_prompt_chunks: int = Field(
        4,
        ge=1,
        le=64,
        description="prompts are read in chunks of 75 tokens, up to this many; the rest is cut off",
    )
    compile: Compile = Field(
        "off",
        description="compile the denoiser for passes of 2, 4, 8 ... rows; graphs: and replay them as CUDA "
        "graphs. Takes minutes at the start; TORCHINDUCTOR_CACHE_DIR keeps the result",
    )
    channels_last: bool = Field(False, description="keep images in memory channel by channel last")
    attention: Attention | None = Field(
        None, description="kernel of scaled dot product attention; absent: torch chooses"
    )
    decode_stream: bool = Field(
        False, description="decode pictures on a CUDA stream of their own, beside the next step"
    )
    vectorised_steps: bool = Field(True, description="images with Euler's sampler take its step together")
    lora: tuple[str, ...] = Field(
        (),
        description="a LoRA file, NAME=PATH; a PATH alone is used by every request that names no LoRA",
    )
    lora_dir: tuple[Path, ...] = Field(
        (), description="folder of LoRA files; requests use the names of the files, or their paths"
    )
    max_loras: int = Field(4, ge=1, le=16, description="LoRAs that one request may mix")
    max_lora_rank: int = Field(
        32,
        ge=1,
        le=256,
        description="LoRAs up to this rank are filled up to it and computed together; larger ones run beside "
        "them. Another value changes the last bits of pictures with LoRAs",
    )
    max_lora_mb: float = Field(2048, gt=0, allow_inf_nan=False, description="largest LoRA file, in MB")
    lora_cache_mb: float = Field(
        1024,
        ge=0,
        allow_inf_nan=False,
        description="memory for loaded LoRAs, in MB; the first to go are those used longest ago",
    )
    controlnet: NamedSources = Field(
        default_factory=dict[str, str],
        description="control model that requests may name: NAME=SOURCE, SOURCE a folder or a hub id; several "
        "in HYPERGEN_CONTROLNET stand with commas between them",
    )
    engine_stall_timeout_s: float = Field(
        300,
        gt=0,
        allow_inf_nan=False,
        description="seconds without a step after which a busy engine is started again",
    )

    @field_validator("lora", "lora_dir", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """In the environment a list is one text, its items separated as in PATH."""
        return tuple(part for part in value.split(os.pathsep) if part) if isinstance(value, str) else value


class QueueSettings(BaseModel, frozen=True, extra="forbid"):
    """How many requests wait, where, and for how long."""

    max_queue_size: int = Field(
        100, ge=1, description="requests that wait for the engine; more wait at the door"
    )
    queue_timeout_s: float = Field(
        600, ge=0, allow_inf_nan=False, description="seconds at the door before 429; 0 refuses at once"
    )
    request_timeout_s: float = Field(
        3600, gt=0, allow_inf_nan=False, description="seconds a request may take in all before 504"
    )
    drain_timeout_s: float = Field(
        60,
        ge=0,
        allow_inf_nan=False,
        description="seconds that accepted requests get when the server is stopped",
    )


class ServerSettings(BaseModel, frozen=True, extra="forbid"):
    """What the HTTP half listens to, believes and gives out."""

    host: str = Field(
        "127.0.0.1", description="address to listen on; 0.0.0.0 is every address of the machine"
    )
    port: int = Field(8000, ge=1, le=65535, description="TCP port to listen on")
    api_key: str | None = Field(
        None,
        min_length=1,
        repr=False,
        description="bearer key that requests must carry; absent: no authentication",
    )
    api_key_file: Path | None = Field(None, description="file whose lines are bearer keys")
    public_url: str | None = Field(
        None,
        pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$",
        description="address that clients know this server by, for `url` results; absent: as asked",
    )
    max_side: int = Field(2048, ge=64, le=8192, description="longest width or height of a picture, in pixels")
    max_steps: int = Field(150, ge=1, le=150, description="most denoising steps of a picture")
    max_megapixel_steps: float = Field(
        6300, gt=0, allow_inf_nan=False, description="work of one request: images x steps x megapixels"
    )
    max_body_mb: float = Field(24, gt=0, allow_inf_nan=False, description="largest request body, in MB")
    price_rate: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="price of one 1024x1024 picture with 25 steps, for the header x-hypergen-price of "
        "Hyperbolic answers and for hypergen_price_total in /metrics; absent: neither",
    )
    image_metadata: bool = Field(True, description="write prompt, seed and settings into the picture's file")
    url_lifetime_s: float = Field(
        3600, ge=60, allow_inf_nan=False, description="seconds that a `url` result can be fetched"
    )
    max_jobs: int = Field(1000, ge=1, description="jobs that are kept, finished and unfinished")
    url_storage_mb: float = Field(
        1024,
        gt=0,
        allow_inf_nan=False,
        description="disk space for `url` results, in MB; the oldest go first",
    )


class Settings(BaseModel, frozen=True, extra="forbid"):
    """Everything that one server is told at its start."""

    model: str | None = Field(
        None, description="hub id, folder or model-store tag; absent: the embedded model"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    served_model_name: str | None = Field(
        None, description="id in /v1/models; absent: what was given as model"
    )
    engine: EngineSettings = Field(default_factory=lambda: EngineSettings.model_validate({}))
    queue: QueueSettings = Field(default_factory=lambda: QueueSettings.model_validate({}))
    server: ServerSettings = Field(default_factory=lambda: ServerSettings.model_validate({}))


def option_name(field: str) -> str:
    """The name of a setting in flags and the environment: the field without its unit of seconds."""
    return field.removesuffix("_s")


def fields(kind: type[BaseModel] = Settings) -> Iterator[tuple[str | None, str, FieldInfo]]:
    """Every setting as (section, field, description of the field); the section of the top level is None."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for _, inner, inner_field in fields(field.annotation):
                yield name, inner, inner_field
        else:
            yield None, name, field


def load_settings(
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Settings:
    """Read settings; flags win over the environment, that over the file, and the file over the defaults.

    Args:
        file: a YAML file with the sections of `Settings`; absent: the environment's `HYPERGEN_CONFIG`.
        flags: field name to value; None means not given.

    Raises:
        ConfigurationError: a key is unknown or a value does not fit. The message is one line.
    """
    environment = environment or {}
    if file is None and environment.get(PREFIX + "CONFIG"):
        file = Path(environment[PREFIX + "CONFIG"])
    tree: dict[str, Any] = _read_file(file) if file else {}
    section_of = {name: section for section, name, _ in fields()}
    field_of = {PREFIX + option_name(name).upper(): name for name in section_of}

    given: dict[str, Any] = {}
    for name, value in environment.items():
        if not name.startswith(PREFIX) or name == PREFIX + "CONFIG" or _KUBERNETES_NAME.match(name):
            continue
        if name == PREFIX + "PORT" and value.startswith("tcp://"):  # Kubernetes again
            continue
        if name not in field_of:
            raise ConfigurationError(
                f"Unknown environment variable {name}; known are {', '.join(sorted(field_of))}."
            )
        if value != "":
            given[field_of[name]] = value
    # A flag that may be given several times and was not is an empty tuple.
    given.update({name: value for name, value in (flags or {}).items() if value not in (None, ())})

    for name, value in given.items():
        section = section_of[name]
        if section is None:
            tree[name] = value
        else:
            tree[section] = {**_names_and_values(tree.get(section), f"Setting '{section}'"), name: value}
    try:
        settings = Settings.model_validate({name: value for name, value in tree.items() if value is not None})
    except ValidationError as error:
        raise ConfigurationError(_explain(error)) from None
    return settings


def environment_of(flags: Mapping[str, Any]) -> dict[str, str]:
    """Flags as the environment of a child process; the child reads them back with `load_settings`."""
    return {
        PREFIX + option_name(name).upper(): as_text(value)
        for name, value in flags.items()
        if value not in (None, ())
    }


def api_keys(server: ServerSettings) -> tuple[str, ...]:
    """The keys that open the server; none means no authentication.

    Raises:
        ConfigurationError: the key file cannot be read or holds no key.
    """
    keys = [server.api_key] if server.api_key else []
    if server.api_key_file:
        try:
            lines = server.api_key_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"The key file {server.api_key_file} cannot be read: {error}.") from None
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ConfigurationError(f"The key file {server.api_key_file} holds no key.")
        keys += found
    return tuple(keys)


def _read_file(file: Path) -> dict[str, Any]:
    try:
        tree: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"The configuration file {file} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"The configuration file {file} is not YAML: {' '.join(str(error).split())}"
        ) from None
    return _names_and_values(tree, f"The configuration file {file}")


def _names_and_values(value: Any, what: str) -> dict[str, Any]:
    """A mapping of YAML; an empty file or section is an empty one."""
    if value is not None and not isinstance(value, dict):
        raise ConfigurationError(f"{what} must hold names and values.")
    return cast(dict[str, Any], value or {})


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"Unknown setting '{where}'."
    given = "" if where.endswith("api_key") else f" (given: {first['input']!r})"
    return f"Setting '{where}': {first['msg']}{given}."
