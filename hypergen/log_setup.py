"""Log lines of HyperGen and BentoML on standard error, labelled with the process that writes them."""

from __future__ import annotations

import json
import logging
import os
import time
from typing import Any

from hypergen.config import ServerSettings

# From the server to its engines: format and level.
_VARIABLE = "_HYPERGEN_LOG"
# BentoML's own lines get the same form, so that a server has one kind of lines.
_LIBRARIES = ("bentoml", "uvicorn.error", "circus")


def export(settings: ServerSettings) -> None:
    """Let this process and those that it starts log by these settings."""
    os.environ[_VARIABLE] = f"{settings.log_format}:{settings.log_level}"


def configure(part: str) -> None:
    """Log by the exported settings; libraries other than BentoML keep their own levels.

    Args:
        part: "http" or "engine".
    """
    _, level = _exported()
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(part))
    logger = logging.getLogger("hypergen")
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        library.handlers, library.propagate = [handler], False
    # It warns of every malformed form, which the client gets as an error.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)


def formatter(part: str) -> logging.Formatter:
    """The formatter of the exported settings."""
    return _JsonFormatter(part) if _exported()[0] == "json" else _TextFormatter(part)


def _exported() -> tuple[str, str]:
    log_format, _, level = os.environ.get(_VARIABLE, "text:info").partition(":")
    return log_format, level


class _TextFormatter(logging.Formatter):
    converter = time.gmtime

    def __init__(self, part: str) -> None:
        super().__init__(f"%(asctime)s.%(msecs)03dZ [{part}] %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")


class _JsonFormatter(logging.Formatter):
    """One JSON object per line: time, part, level, message, and the fields of a request's line."""

    converter = time.gmtime

    def __init__(self, part: str) -> None:
        super().__init__(datefmt="%Y-%m-%dT%H:%M:%S")
        self._part = part

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": f"{self.formatTime(record, self.datefmt)}.{int(record.msecs):03d}Z",
            "part": self._part,
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
