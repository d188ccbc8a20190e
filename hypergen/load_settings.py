"""Load settings from a file, the environment and flags; later sources override earlier ones."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from hypergen.config import Settings
from hypergen.errors import ConfigurationError
from hypergen.served_model_config import ModelEntry, as_text, explain_yaml, file_of_entry

PREFIX = "HYPERGEN_"
# Separated by commas in the environment. Others are paths, which may contain commas.
_WITH_COMMAS = ("allowed_host", "compile_sizes", "cors_origin", "devices", "trusted_proxy")
# Not in messages, nor in a Bento.
_SECRETS = ("api_key", "jobs")
# Variables that Kubernetes sets in every pod for a service whose name begins with "hypergen".
_KUBERNETES_NAME = re.compile(
    r"HYPERGEN_(\w+_)?(SERVICE_(HOST|PORT)(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_KUBERNETES_PORT = re.compile(r"HYPERGEN_(\w+_)?PORT")


def option_name(field: str) -> str:
    """The name of a setting in flags and the environment: the field without its unit of seconds."""
    return field.removesuffix("_s")


def fields(model: type[BaseModel] = Settings) -> Iterator[tuple[str | None, str, FieldInfo]]:
    """Every setting as (section, name, field); the section is None at the top level."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for _, inner, inner_field in fields(field.annotation):
                yield name, inner, inner_field
        else:
            yield None, name, field


def load_settings(
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Settings:
    """Read settings; flags override the environment, which overrides the file, which overrides the arguments.

    Args:
        file: a YAML file with the sections of `Settings`; by default `HYPERGEN_CONFIG` of the environment.
        flags: field name -> value; None means not given.
        arguments: name as in the environment, without the prefix and in lower case -> value. A Bento keeps
            them from its build.

    Raises:
        ConfigurationError: a key is unknown or a value is invalid. The message is one line.
    """
    environment = environment or {}
    if file is None and environment.get(PREFIX + "CONFIG"):
        file = Path(environment[PREFIX + "CONFIG"])
    tree: dict[str, Any] = read_file(file) if file else {}
    section_of = {name: section for section, name, _ in fields()}
    field_of = {PREFIX + option_name(name).upper(): name for name in section_of}

    used_arguments = _add_arguments(tree, arguments or {})
    given: dict[str, Any] = {}
    for name, value in environment.items():
        if not name.startswith(PREFIX) or name == PREFIX + "CONFIG" or _is_of_kubernetes(name, value):
            continue
        if name not in field_of:
            raise ConfigurationError(f"Unknown environment variable {name}{_nearest(name, field_of)}")
        if name == PREFIX + "API_KEY" and not value.strip():
            raise ConfigurationError(f"{name} is empty; unset it for a server without a key.")
        if value != "":
            given[field_of[name]] = value
    # An empty tuple is a repeatable flag that was not given.
    flags = {name: value for name, value in (flags or {}).items() if value not in (None, ())}
    for name, value in {**given, **flags}.items():
        _set(tree, section_of[name], name, value)
    try:
        settings = Settings.model_validate({name: value for name, value in tree.items() if value is not None})
    except ValidationError as error:
        given_as: dict[int | str, str] = {name: f"Argument '{option_name(name)}'" for name in used_arguments}
        given_as |= {name: PREFIX + option_name(name).upper() for name in given}
        given_as |= {name: "--" + option_name(name).replace("_", "-") for name in flags}
        raise ConfigurationError(_explain(error, given_as, file, tree.get("models"))) from None
    return settings


def _add_arguments(tree: dict[str, Any], arguments: Mapping[str, Any]) -> list[str]:
    """Add the arguments that the file does not override; returns their fields."""
    known = {option_name(name): (section, name) for section, name, _ in fields()}
    added: list[str] = []
    for option, value in arguments.items():
        if option not in known:
            raise ConfigurationError(f"Unknown argument '{option}'{_nearest(option, known)}")
        section, name = known[option]
        if name in _SECRETS:
            variable = PREFIX + option_name(name).upper()
            raise ConfigurationError(
                f"Argument '{name}' would be readable in the Bento; set {variable} where it is served."
            )
        in_file = tree if section is None else _as_mapping(tree.get(section), f"Setting '{section}'")
        if in_file.get(name) is None:
            _set(tree, section, name, value)
            added.append(name)
    return added


def _set(tree: dict[str, Any], section: str | None, name: str, value: Any) -> None:
    if section is None:
        tree[name] = value
    else:
        tree[section] = {**_as_mapping(tree.get(section), f"Setting '{section}'"), name: value}


def _is_of_kubernetes(name: str, value: str) -> bool:
    is_port = _KUBERNETES_PORT.fullmatch(name) and value.startswith(("tcp://", "udp://", "sctp://"))
    return bool(is_port or _KUBERNETES_NAME.fullmatch(name))


def environment_of(flags: Mapping[str, Any]) -> dict[str, str]:
    """Flags as environment variables, for `load_settings` in a child process."""
    return {
        PREFIX + option_name(name).upper(): as_text(value, "," if name in _WITH_COMMAS else os.pathsep)
        for name, value in flags.items()
        if value not in (None, ())
    }


def read_file(file: Path) -> dict[str, Any]:
    """A YAML file of names and values.

    Raises:
        ConfigurationError: it cannot be read. The message is one line.
    """
    try:
        tree: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"The configuration file {file} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{explain_yaml(file, error)}.") from None
    return _as_mapping(tree, f"The configuration file {file}")


def _as_mapping(value: Any, name: str) -> dict[str, Any]:
    """A YAML mapping; an empty file or section becomes an empty one."""
    if value is not None and not isinstance(value, dict):
        raise ConfigurationError(f"{name} must be a mapping of names to values.")
    return cast(dict[str, Any], value or {})


def _explain(
    error: ValidationError, given_as: Mapping[int | str, str], file: Path | None, models: Any
) -> str:
    """One line: which setting is wrong, as the user wrote it, and why.

    Args:
        given_as: field -> the flag or variable that gave it. Others are of the file.
        models: the setting of this name, whose entries may be files of their own.
    """
    first = error.errors(include_url=False)[0]
    location = first["loc"]
    given = next((part for part in location[:2] if part in given_as), None)
    known = [name if section is None else f"{section}.{name}" for section, name, _ in fields()]
    match location:
        case ("models", int(index), *inner):
            known = [
                name if section is None else f"{section}.{name}" for section, name, _ in fields(ModelEntry)
            ]
            if model_file := file_of_entry(models, index):
                file, location, given = model_file, tuple(inner), None
    name = ".".join(str(part) for part in location)
    where = _place(file, location) if file is not None and given is None else ""
    if first["type"] == "extra_forbidden":
        return f"{where}Unknown setting '{name}'{_nearest(name, known)}"
    # MODEL is no flag, and may have fields.
    shown = f"Setting '{name}'" if given in (None, "models") else given_as[given]
    hidden = first["input"] is None or name.rpartition(".")[2] in ("models", *_SECRETS)
    value = "" if hidden else f" (given: {first['input']!r})"
    return f"{where}{shown}: {first['msg'].removeprefix('Value error, ')}{value}."


def _nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known names like this one, also without their section: "port" is "server.port"."""
    inner = {other.rpartition(".")[2]: other for other in known}
    found = [inner[name]] if name in inner else get_close_matches(name, inner.values(), 2, 0.75)
    if not found:
        last = get_close_matches(name.rpartition(".")[2], inner, 2, 0.6)
        found = [inner[other] for other in last]
    return f"; did you mean {' or '.join(found)}?" if found else "."


def _place(file: Path, location: tuple[int | str, ...]) -> str:
    """The file and the line of a setting, as the start of a message."""
    node: Any = yaml.compose(file.read_text(encoding="utf-8"))
    line = 0
    for part in location:
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == part), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            pair = (node.value[part], node.value[part])
        else:
            pair = None
        if pair is None:
            break
        line, node = pair[0].start_mark.line + 1, pair[1]
    return f"{file}, line {line}: " if line else f"{file}: "
