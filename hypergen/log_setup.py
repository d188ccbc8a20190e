"""Logs: one line each on standard error, with the part of the server that speaks."""

from __future__ import annotations

import logging


def configure(part: str) -> None:
    """Let this process's HyperGen loggers speak from INFO on; what libraries say is left as they have it.

    Args:
        part: "http" or "engine".
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s [{part}] %(levelname)s %(message)s"))
    logger = logging.getLogger("hypergen")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # It warns of every malformed form, whose sender is told.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
