"""The log lines of a test server."""

from __future__ import annotations

import json
import re
import shlex
import time
from typing import Any

from tests.support.live_server import LiveServer

# Time in UTC, part and model, level, message and fields.
LINE = re.compile(
    r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) \[(serve|http|engine [^]]+)\] "
    r"(DEBUG|INFO|WARNING|ERROR) (.+)"
)


def logged(server: LiveServer, words: str) -> str:
    """The one line with these words, for example a request's id; it is written after the response."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        lines = [line for line in server.log().split("\n") if words in line]
        if lines:
            (line,) = lines
            return line
        time.sleep(0.02)
    raise AssertionError(f"No log line has {words}:\n{server.log()}")


def text_fields(line: str) -> dict[str, str]:
    """The fields `name=value` at the end of a text line."""
    return dict(part.split("=", 1) for part in shlex.split(line) if "=" in part)


def json_lines(server: LiveServer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.log().splitlines()]
