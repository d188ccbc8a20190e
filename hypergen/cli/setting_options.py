"""Command-line flags from the fields of the settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from hypergen.setting_names import fields, flag_of

Command = Callable[..., None]
CONFIG = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="YAML file with settings; flags and HYPERGEN_... variables win over it",
)


def setting_options(*names: str) -> Callable[[Command], Command]:
    """Flags generated from the fields of the settings, by default from all."""

    def add(command: Command) -> Command:
        chosen = [
            (name, field) for _, name, field in fields() if (not names or name in names) and name != "models"
        ]
        for name, field in reversed(chosen):
            repeatable = get_origin(field.annotation) in (dict, tuple)
            command = click.option(
                *_declaration(name, field),
                type=_type(field),
                multiple=repeatable,
                default=None,
                callback=_none_if_absent if repeatable else None,
                help=_help(field),
            )(command)
        return command

    return add


def _none_if_absent(_context: click.Context, _parameter: click.Parameter, value: tuple[str, ...]) -> Any:
    """None for a repeatable flag that was not given."""
    return value or None


def _declaration(name: str, field: FieldInfo) -> list[str]:
    flag = flag_of(name)
    return [f"{flag}/--no-{flag.removeprefix('--')}" if field.annotation is bool else flag, name]


def _type(field: FieldInfo) -> Any:
    if get_origin(field.annotation) is tuple:
        return click.Path(path_type=Path) if Path in get_args(field.annotation) else str
    types = [arg for arg in get_args(field.annotation) if arg is not type(None)] or [field.annotation]
    first = types[0]
    if get_origin(field.annotation) is Literal:
        return click.Choice(types)
    if get_origin(first) is Literal:
        return click.Choice(get_args(first))
    return {int: int, float: float, bool: bool, Path: click.Path(path_type=Path)}.get(first, str)


def _help(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default == ():
        return f"{field.description}; may be given several times"
    if default in (None, {}, ""):
        return str(field.description)
    shown = ("yes" if default else "no") if isinstance(default, bool) else default
    return f"{field.description}  [default: {shown}]"
