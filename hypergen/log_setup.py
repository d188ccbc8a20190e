"""Log lines on standard error, labelled with the process that writes them."""

from __future__ import annotations

import logging


def configure(part: str) -> None:
    """Log HyperGen's messages from INFO on; libraries keep their own levels.

    Args:
        part: "http" or "engine".
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s [{part}] %(levelname)s %(message)s"))
    logger = logging.getLogger("hypergen")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # It warns of every malformed form, which the client gets as an error.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
