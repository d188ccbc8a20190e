"""Log lines while a model loads."""

from __future__ import annotations

import logging
import mmap
import re
import time

import pytest

from hypergen.engine.loading_progress import log_progress

GROWN = re.compile(
    r"^Still loading sd after \d+ s: (\S+) GB more memory in use, for 2 GB of weights\.$", re.M
)


def test_loading_is_reported_until_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hypergen.engine.loading_progress")

    def grown_gb() -> float:
        return max((float(figure) for figure in GROWN.findall("\n".join(caplog.messages))), default=0)

    def load() -> None:
        # Not from the heap, which may have memory left over from other tests.
        with log_progress("sd", 2_000_000_000, interval_s=0.05), mmap.mmap(-1, 100_000_000) as taken:
            taken.write(b"x" * len(taken))
            until = time.monotonic() + 30
            while grown_gb() < 0.09:
                assert time.monotonic() < until, caplog.messages
                time.sleep(0.01)
            raise OSError(f"unreadable after {len(taken)} bytes")

    with pytest.raises(OSError, match="unreadable after 100000000 bytes"):
        load()
    assert caplog.messages[0] == "Loading sd: 2 GB of weights."
    assert grown_gb() < 2
    count = len(caplog.records)
    time.sleep(0.2)
    assert len(caplog.records) == count  # no thread is left
