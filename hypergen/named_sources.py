"""Settings that name several sources: a mapping in a file, NAME=SOURCE in flags and the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, cast

from pydantic import BeforeValidator


def _read(value: Any) -> Any:
    """From what flags (a list of NAME=SOURCE) and the environment (one text, with commas) give."""
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, (list, tuple)):
        pairs = [str(entry).partition("=") for entry in cast(Sequence[Any], value)]
        value = {name.strip(): source.strip() for name, _, source in pairs}
        if len(value) < len(pairs):
            raise ValueError("a name stands there twice")
    if isinstance(value, Mapping):
        value = cast(Mapping[Any, Any], value)
        for name, source in value.items():
            if not (name and source) or "," in f"{name}{source}":
                raise ValueError("must be NAME=SOURCE, without commas")
    return value


NamedSources = Annotated[dict[str, str], BeforeValidator(_read)]


def as_text(value: object, separator: str = os.pathsep) -> str:
    """A setting as the environment holds it.

    Args:
        separator: between the items of a list.
    """
    if isinstance(value, Mapping):
        return ",".join(f"{name}={source}" for name, source in cast(Mapping[str, str], value).items())
    if isinstance(value, tuple):
        return separator.join(map(str, cast(tuple[Any, ...], value)))
    return str(value)
