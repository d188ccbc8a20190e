"""What an engine reports of its requests and of itself: plain frozen values that can be pickled."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

# exact: rows of one forward pass do not depend on their neighbours, proved by a probe; close: they do, in the
# last bits.
Verdict = Literal["exact", "close"]


State = Literal["loading", "ready", "recovering", "failed", "draining"]


class RequestState(StrEnum):
    """Where a request is on its way."""

    WAITING = "waiting"
    PREPARING = "preparing"
    RUNNING = "running"
    DECODING = "decoding"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Started:
    """The first image of the request joined the batch: the request no longer waits."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Denoising steps done and due, over all images of the request."""

    step: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFinished:
    """One finished picture as the bytes of its file."""

    index: int
    seed: int
    data: bytes
    prompt_tokens: int
    # Forward passes in which rows of other requests ran beside this image's.
    shared_forwards: int
    engine_s: float = 0.0  # seconds from when the engine took the request to decoded pixels
    encode_s: float = 0.0  # seconds that a thread took to write the file


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What a running image would be if it ended now, as the bytes of a file.

    After the death of an engine an image starts again and its previews come again, with the same numbers.
    """

    index: int
    number: int  # 0, 1, 2 ... of this image
    data: bytes


Event = Started | Progress | Preview | ImageFinished


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """What one engine last said of itself."""

    state: State
    device: str | None = None
    reason: str | None = None
    determinism: dict[str, Verdict] = field(
        default_factory=dict[str, Verdict]
    )  # "512x512" -> verdict of the probe
    forwards: int = 0  # forward passes since the start
    image_steps: int = 0  # images in those passes, summed
    restarts: int = 0
    models: tuple[str, ...] = ()  # ids of those in memory
    # Stage of the start -> seconds it took: imports, weights, warm-up.
    startup_s: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatus:
    """What `/health` tells: the state of the whole, its requests, and each engine."""

    state: State
    reason: str | None
    running: int
    waiting: int
    overflow: int
    engines: tuple[EngineStatus, ...]

    @property
    def queue_size(self) -> int:
        """Requests accepted and unfinished, the door included."""
        return self.running + self.waiting + self.overflow


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """What a waiting request has before it."""

    position: int  # requests that came earlier and wait too
    expected_s: float | None  # until its pictures are done, at the measured pace; None: nothing measured yet
