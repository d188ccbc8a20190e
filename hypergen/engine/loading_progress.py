"""Log lines about the progress of loading a model."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

from hypergen import log_setup
from hypergen.engine.device_memory import memory_bytes

logger = logging.getLogger(__name__)


@contextmanager
def log_progress(model_id: str, expected_bytes: int, interval_s: float = 10.0) -> Generator[None]:
    """Log the start, and every `interval_s` until the end how much memory the process took meanwhile.

    Args:
        expected_bytes: the weights; the rest of the memory is for copies and kernels.
    """
    logger.info("Loading %s: %.3g GB of weights.", model_id, expected_bytes / 1e9)
    started, before = time.monotonic(), _memory_in_use()
    loaded = threading.Event()

    def log_until_loaded() -> None:
        log_setup.current_model.set(model_id)
        while not loaded.wait(interval_s):
            seconds, taken = time.monotonic() - started, _memory_in_use() - before
            logger.info(
                "Still loading %s after %.0f s: %.3g GB more memory in use, for %.3g GB of weights.",
                model_id,
                seconds,
                max(0, taken) / 1e9,
                expected_bytes / 1e9,
            )

    thread = threading.Thread(target=log_until_loaded, daemon=True)
    thread.start()
    try:
        yield
    finally:
        loaded.set()
        thread.join()


def _memory_in_use() -> int:
    """Memory of the process, and what it allocated on a GPU."""
    memory = memory_bytes()
    return memory["resident"] + memory.get("allocated", 0)
