"""Streams and events: who has seen what of whom."""

from __future__ import annotations

import threading
from collections import Counter

import torch

from tests.support.fake_cuda.active import current

_local = threading.local()


class FakeStream:
    """A stream: a count of its operations, and how far it has seen those of others."""

    def __init__(self, device: object = None, priority: int = 0, **_: object) -> None:
        self.count = 0
        self.seen: Counter[FakeStream] = Counter()
        self.device = torch.device("cuda:0")

    def synchronize(self) -> None:
        current().wait("stream", {**self.seen, self: self.count})

    def wait_stream(self, other: FakeStream) -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: FakeEvent) -> None:
        self.seen |= event.recorded

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent()
        event.record(self)
        return event

    def query(self) -> bool:
        return False

    def __enter__(self) -> FakeStream:
        self._before = current_stream()
        _local.stream = self
        return self

    def __exit__(self, *_: object) -> None:
        _local.stream = self._before


class FakeEvent:
    """An event; times are counted in launches."""

    def __init__(self, enable_timing: bool = False, **_: object) -> None:
        self.recorded: Counter[FakeStream] = Counter()
        self.timed = enable_timing
        self.at = 0

    def record(self, stream: FakeStream | None = None) -> None:
        stream = stream or current_stream()
        self.recorded = Counter({**stream.seen, stream: stream.count})
        self.at = current().launched

    def wait(self, stream: FakeStream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        current().wait("event", self.recorded)

    def query(self) -> bool:
        """Whether the host knows already that the event has passed."""
        return all(current().known[stream] >= at for stream, at in self.recorded.items())

    def elapsed_time(self, end: FakeEvent) -> float:
        """Milliseconds: one for a hundred launches."""
        if not (self.timed and end.timed):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        if not (self.query() and end.query()):
            raise RuntimeError("device not ready")
        return (end.at - self.at) / 100 + 1e-3


def current_stream(device: object = None) -> FakeStream:
    return getattr(_local, "stream", None) or current().default_stream


def use_default_stream() -> None:
    """In this thread."""
    _local.stream = None
