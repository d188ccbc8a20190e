"""Types of settings, with how each is parsed from a flag, a variable or YAML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator

from hypergen.device_names import read_devices

Dtype = Literal["float16", "bfloat16", "float32"]
Determinism = Literal["strict", "fast"]
LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


def _read_on_off(value: Any) -> Any:
    """YAML reads on and off as booleans."""
    return ("on" if value else "off") if isinstance(value, bool) else value


_OnOff = BeforeValidator(_read_on_off)
Compile = Annotated[Literal["off", "on"], _OnOff]
VaeTiling = Annotated[Literal["off", "on"], _OnOff]
Offload = Annotated[Literal["off", "model"], _OnOff]
Quantization = Annotated[Literal["off", "int8", "fp8"], _OnOff]


def _read_sizes(value: Any) -> Any:
    """Parse WIDTHxHEIGHT, one or several separated by commas, or a list of them."""
    if not isinstance(value, (str, list, tuple)):
        return value
    given = [value] if isinstance(value, str) else cast(Sequence[Any], value)
    return tuple(dict.fromkeys(_read_size(part) for entry in given for part in str(entry).split(",")))


def _read_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d+)x(\d+)\s*", text)
    width, height = map(int, match.groups()) if match else (0, 0)
    if any(side % 8 or not 64 <= side <= 8192 for side in (width, height)):
        raise ValueError(
            "must be sizes such as 1024x1024,512x512: width and height are multiples of 8, from 64 to 8192"
        )
    return width, height


Devices = Annotated[tuple[str, ...], BeforeValidator(read_devices)]
Sizes = Annotated[tuple[tuple[int, int], ...], BeforeValidator(_read_sizes)]


def both_or_none(key: Path | None, certificate: Path | None) -> Path | None:
    if (key is None) != (certificate is None):
        raise ValueError("certificate and key must be given together")
    return key
