"""Log lines of HyperGen and of its libraries: one form, on standard error, with the process and the model.

No line holds control characters, so that a client cannot forge lines or send codes to a terminal.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

# The model that this thread works for; it names the engine's lines.
current_model: ContextVar[str] = ContextVar("current_model", default="")

# Format and level, from the server to its engines.
_VARIABLE = "_HYPERGEN_LOG"
# They have handlers of their own otherwise.
_LIBRARIES = ("bentoml", "uvicorn.error", "circus", "py.warnings")


def export(log_format: str, level: str) -> None:
    """Set the format, "text" or "json", and the level of this process and of those that it starts."""
    os.environ[_VARIABLE] = f"{log_format}:{level}"


def configure(part: str, models: str = "") -> None:
    """Log by the exported settings; libraries other than BentoML log warnings and errors.

    Args:
        part: "serve", "http" or "engine".
        models: for lines of threads without a `current_model`.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(part, models))
    handler.setLevel(level())
    logging.getLogger().handlers = [handler]
    logger = logging.getLogger("hypergen")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level())
    logging.captureWarnings(True)
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        library.handlers, library.propagate = [handler], False
    logging.getLogger("asyncio").filters = [_RepeatFilter()]
    # It warns of every malformed form, which the client gets as an error.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)


def formatter(part: str, models: str = "") -> logging.Formatter:
    """The formatter of the exported format."""
    return (_JsonFormatter if _exported()[0] == "json" else _TextFormatter)(part, models)


def level() -> str:
    """The exported level, by its name in `logging`."""
    return _exported()[1].upper()


def _exported() -> tuple[str, str]:
    log_format, _, level_name = os.environ.get(_VARIABLE, "text:info").partition(":")
    return log_format, level_name


class _RepeatFilter(logging.Filter):
    """Drops repeats of the last message for a minute.

    Without free file descriptors asyncio logs thousands of times a second that it cannot accept connections.
    """

    _INTERVAL_S = 60.0

    def __init__(self) -> None:
        super().__init__()
        self._last = ""
        self._logged_at = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message == self._last and record.created - self._logged_at < self._INTERVAL_S:
            return False
        self._last, self._logged_at = message, record.created
        return True


class _Formatter(logging.Formatter):
    """Times are UTC. The attribute `fields` of a record, a mapping, is added to its line."""

    converter = time.gmtime
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self, part: str, models: str) -> None:
        super().__init__()
        self._part = part
        self._models = models

    def _model(self) -> str:
        return current_model.get() or self._models


class _TextFormatter(_Formatter):
    """`TIME [PART MODEL] LEVEL MESSAGE name=value ...`; the lines of a traceback follow, indented."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        source = f"{self._part} {self._model()}".rstrip()
        line = f"{self.formatTime(record)} [{source}] {record.levelname} {record.getMessage()}"
        line += "".join(f" {name}={_quoted(str(value))}" for name, value in fields.items())
        lines = [line]
        if record.exc_info:
            lines += [f"  {part}" for part in self.formatException(record.exc_info).split("\n")]
        return "\n".join(map(_escaped, lines))


class _JsonFormatter(_Formatter):
    """One JSON object per line, in ASCII: time, level, part, model, message, exception.

    Named arguments of the message and fields are keys, too.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "part": self._part,
        }
        if model := self._model():
            line["model"] = model
        named = record.args if isinstance(record.args, Mapping) else {}
        line |= {"message": record.getMessage(), **named, **getattr(record, "fields", {})}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _quoted(value: str) -> str:
    """A value in quotes if a reader could take a part of it for another field."""
    return value if re.fullmatch(r"[\w./:@+,-]+", value) else json.dumps(value)


def _escaped(text: str) -> str:
    """Text without control, format and separator characters, such as line feeds or terminal codes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
