"""BentoML's log lines in the form of ours, in all of its processes."""

from __future__ import annotations

import logging
from typing import Any

from bentoml._internal import log

from hypergen import log_setup


def use_our_form() -> None:
    """Change the configuration that BentoML applies when it serves, and apply it if it serves already."""
    configuration: dict[str, Any] = log.SERVER_LOGGING_CONFIG
    configuration["disable_existing_loggers"] = False
    configuration["formatters"]["traced"] = {"()": log_setup.formatter, "part": "serve"}
    configuration["handlers"]["tracehandler"] |= {"stream": "ext://sys.stderr", "level": log_setup.level()}
    if any(handler.name == "tracehandler" for handler in logging.getLogger("bentoml").handlers):
        log.configure_server_logging()
