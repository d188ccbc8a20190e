"""Log lines while a model loads."""

from __future__ import annotations

import logging
import time

import pytest

from hypergen.engine.loading_progress import log_progress


def test_loading_is_reported_until_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hypergen.engine.loading_progress")

    def load() -> None:
        with log_progress("sd", 2_000_000_000, interval_s=0.05):
            taken = bytearray(b"x" * 50_000_000)
            until = time.monotonic() + 30
            while len(caplog.records) < 3:
                assert time.monotonic() < until
                time.sleep(0.01)
            raise OSError(f"unreadable after {len(taken)} bytes")

    with pytest.raises(OSError, match="unreadable after 50000000 bytes"):
        load()
    messages = [entry.getMessage() for entry in caplog.records]
    assert messages[0] == "Loading sd: 2 GB of weights."
    assert messages[1].startswith("Still loading sd after ")
    grown = float(messages[2].split(": ")[1].split(" GB")[0])
    assert 0.04 < grown < 2
    count = len(caplog.records)
    time.sleep(0.2)
    assert len(caplog.records) == count  # no thread is left
