"""Load settings from a file, the environment and flags; later sources override earlier ones."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError

from hypergen.config import Settings
from hypergen.errors import ConfigurationError
from hypergen.served_model_config import as_text, explain_yaml
from hypergen.setting_names import (
    PREFIX,
    SECRETS,
    SettingNames,
    fields,
    flag_of,
    nearest,
    option_name,
    variable_of,
)

# Separated by commas in the environment. Others are paths, which may contain commas.
_WITH_COMMAS = ("allowed_host", "compile_sizes", "cors_origin", "devices", "trusted_proxy")
# Variables that Kubernetes sets in every pod for a service whose name begins with "hypergen".
_KUBERNETES_NAME = re.compile(
    r"HYPERGEN_(\w+_)?(SERVICE_(HOST|PORT)(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_KUBERNETES_PORT = re.compile(r"HYPERGEN_(\w+_)?PORT")


def load_settings(
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings of `load_named_settings`."""
    return load_named_settings(file, environment, flags, arguments)[0]


def load_named_settings(
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> tuple[Settings, SettingNames]:
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
    field_of = {variable_of(name): name for name in section_of}
    in_file = {name for name, section in section_of.items() if _is_set(tree, section, name)}

    used_arguments = _add_arguments(tree, arguments or {})
    given: dict[str, Any] = {}
    for name, value in environment.items():
        if not name.startswith(PREFIX) or name == PREFIX + "CONFIG" or _is_of_kubernetes(name, value):
            continue
        if name not in field_of:
            raise ConfigurationError(f"Unknown environment variable {name}{nearest(name, field_of)}")
        if name == PREFIX + "API_KEY" and not value.strip():
            raise ConfigurationError(f"{name} is empty; unset it for a server without a key.")
        if value != "":
            given[field_of[name]] = value
    # An empty tuple is a repeatable flag that was not given.
    flags = {name: value for name, value in (flags or {}).items() if value not in (None, ())}
    for name, value in {**given, **flags}.items():
        _set(tree, section_of[name], name, value)
    given_as = {name: f"Argument '{option_name(name)}'" for name in used_arguments}
    given_as |= {name: variable_of(name) for name in given}
    given_as |= {name: flag_of(name) for name in flags}
    names = SettingNames(given_as, file, frozenset(in_file), tree.get("models"))
    try:
        settings = Settings.model_validate({name: value for name, value in tree.items() if value is not None})
    except ValidationError as error:
        raise ConfigurationError(names.of_invalid(error)) from None
    return settings, names


def _add_arguments(tree: dict[str, Any], arguments: Mapping[str, Any]) -> list[str]:
    """Add the arguments that the file does not override; returns their fields."""
    known = {option_name(name): (section, name) for section, name, _ in fields()}
    added: list[str] = []
    for option, value in arguments.items():
        if option not in known:
            raise ConfigurationError(f"Unknown argument '{option}'{nearest(option, known)}")
        section, name = known[option]
        if name in SECRETS:
            variable = variable_of(name)
            raise ConfigurationError(
                f"Argument '{name}' would be readable in the Bento; set {variable} where it is served."
            )
        in_file = tree if section is None else _as_mapping(tree.get(section), f"Setting '{section}'")
        if in_file.get(name) is None:
            _set(tree, section, name, value)
            added.append(name)
    return added


def _is_set(tree: Mapping[str, Any], section: str | None, name: str) -> bool:
    values = tree if section is None else tree.get(section)
    return isinstance(values, Mapping) and cast(Mapping[str, Any], values).get(name) is not None


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
        variable_of(name): as_text(value, "," if name in _WITH_COMMAS else os.pathsep)
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
