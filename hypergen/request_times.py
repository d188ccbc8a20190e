"""How long the stages of a request took, from its events."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from hypergen.events import Event, ImageFinished, Progress, Started


@dataclass(eq=False)
class RequestTimes:
    """Seconds of the stages of one request; call `observe` with each of its events when it arrives.

    After an engine crash, the second run counts.

    Attributes:
        submitted_at, started_at, denoised_at: monotonic; started and denoised once that has happened.
        encode_s: to encode the prompts and to prepare the images.
        images: the finished images, without their data.
    """

    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    denoised_at: float | None = None
    encode_s: float = 0.0
    images: list[ImageTimes] = field(default_factory=list["ImageTimes"])

    def observe(self, event: Event) -> None:
        match event:
            case Started(encode_s=encode_s):
                self.started_at, self.encode_s = time.monotonic(), encode_s
            case Progress(step=step, steps=steps) if step == steps:
                self.denoised_at = time.monotonic()
            case ImageFinished():
                self.images.append(
                    ImageTimes(event.index, event.decode_s, event.encode_s, event.images_per_forward)
                )
            case _:
                pass

    @property
    def queue_s(self) -> float | None:
        """From the submission to the first forward pass, without `encode_s`; None before that."""
        if self.started_at is None:
            return None
        return max(0.0, self.started_at - self.submitted_at - self.encode_s)

    @property
    def denoise_s(self) -> float | None:
        """From the first forward pass to the last step of the last image; None before that."""
        if self.started_at is None or self.denoised_at is None:
            return None
        return max(0.0, self.denoised_at - self.started_at)

    @property
    def images_per_forward(self) -> float | None:
        """Mean batch size, in images, of this request's forward passes."""
        sizes = [image.images_per_forward for image in self.images if image.images_per_forward]
        return sum(sizes) / len(sizes) if sizes else None

    def stages(self) -> Iterator[Stage]:
        """The stages that have ended: one each of a request, the others of each image."""
        if self.started_at is not None and self.queue_s is not None:
            yield Stage("queue", self.submitted_at, self.queue_s)
            yield Stage("encode", self.started_at - self.encode_s, self.encode_s)
            if self.denoise_s is not None:
                yield Stage("denoise", self.started_at, self.denoise_s)
        for image in self.images:
            written_at = image.finished_at - image.write_s
            yield Stage("decode", written_at - image.decode_s, image.decode_s, image.index)
            yield Stage("write", written_at, image.write_s, image.index)


class Stage(NamedTuple):
    """One stage of a request, or of the image with this index.

    `started_at` is monotonic. That of decode is counted back from the end of the image, so it is late by the
    time that the image waited for a thread that writes files.
    """

    name: str
    started_at: float
    seconds: float
    image: int | None = None


@dataclass(frozen=True, slots=True)
class ImageTimes:
    """Seconds of the last stages of one image, its mean batch size, and its arrival (monotonic)."""

    index: int
    decode_s: float
    write_s: float
    images_per_forward: float
    finished_at: float = field(default_factory=time.monotonic)
