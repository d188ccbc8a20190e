"""Events of a request and the status of an engine: plain frozen values that can be pickled."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

# exact: the probe found the rows of a forward pass batch-invariant; close: they differ in the last bits.
Verdict = Literal["exact", "close"]


State = Literal["loading", "ready", "recovering", "failed", "draining"]


class RequestState(StrEnum):
    """The stage of a request."""

    WAITING = "waiting"
    PREPARING = "preparing"
    RUNNING = "running"
    DECODING = "decoding"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Started:
    """The first image of the request joined a batch: the request no longer waits.

    Attributes:
        encode_s: seconds to encode the prompts and to prepare the images.
    """

    encode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """Denoising steps done and in total, over all images of the request."""

    step: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFinished:
    """One finished image as the bytes of its file."""

    index: int
    seed: int
    data: bytes = field(repr=False)
    prompt_tokens: int
    # Forward passes that this image shared with rows of other requests.
    shared_forwards: int
    images_per_forward: float = 0.0  # mean batch size of its forward passes; 0: it had none
    engine_s: float = 0.0  # seconds from the engine's receipt of the request to decoded pixels
    decode_s: float = 0.0  # seconds from the last denoising step to decoded pixels
    encode_s: float = 0.0  # seconds to encode the file, in a thread


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """The predicted result of a running image, as the bytes of a file.

    After an engine crash an image restarts, and its previews come again with the same numbers.
    """

    index: int
    number: int  # 0, 1, 2 ... within this image
    data: bytes = field(repr=False)


Event = Started | Progress | Preview | ImageFinished


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """One forward pass of the denoiser of a model.

    Attributes:
        rows: two for each guided image, and those that pad the batch.
    """

    model: str
    images: int
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """The last reported status of one engine."""

    state: State
    device: str | None = None
    reason: str | None = None
    # "512x512" -> verdict of the probe.
    determinism: dict[str, Verdict] = field(default_factory=dict[str, Verdict])
    # Size -> the row counts that its batches are padded to. A size whose batches may have any is not in it.
    row_counts: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    forwards: int = 0  # forward passes since the start of the process
    image_steps: int = 0  # images in those passes, in total
    restarts: int = 0
    requests: int = 0  # unfinished ones that the pool gave it
    models: tuple[str, ...] = ()  # ids of the models in memory
    # Seconds of each stage of the startup: imports, weights, warm-up.
    startup_s: dict[str, float] = field(default_factory=dict[str, float])
    load_s: dict[str, float] = field(default_factory=dict[str, float])  # model -> seconds of its latest load
    # Of the process: resident; on CUDA also allocated and reserved by torch, and total of the GPU.
    memory_bytes: dict[str, int] = field(default_factory=dict[str, int])
    loras: int = 0  # LoRAs in memory
    # Cache -> hits and misses since the start of the process.
    cache_lookups: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatus:
    """The content of `/health`: the state of the server, its requests, and each engine."""

    state: State
    reason: str | None
    running: int
    waiting: int
    overflow: int
    engines: tuple[EngineStatus, ...]

    @property
    def queue_size(self) -> int:
        """Unfinished requests, including the overflow queue."""
        return self.running + self.waiting + self.overflow


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """Queue position and estimated completion time of a waiting request."""

    position: int  # number of waiting requests that came earlier
    expected_s: float | None  # until its images are done, at the measured throughput; None before that
