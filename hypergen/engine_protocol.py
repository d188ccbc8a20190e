"""The interface between the HTTP process and the engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self

from hypergen.errors import GenerationError
from hypergen.events import Event, ImageFinished, QueuePosition, RequestState, ServerStatus
from hypergen.model_info import ModelInfo
from hypergen.request import GenerationRequest


class RequestHandle(Protocol):
    """One submitted request, as an iterator of its events for one consumer.

    The events end with the last `ImageFinished`, or when the request is cancelled. The end of a `with` block
    cancels the request.

    Raises:
        RequestError: instead of the next event, if the request failed.
    """

    state: RequestState

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def queue_position(self) -> QueuePosition | None:
        """None unless the request is waiting."""
        ...

    def cancel(self) -> None:
        """Remove the request from the queue and the engine at once; no effect if it has ended."""
        ...


class ImageGenerator(Protocol):
    """The pool of engine processes, for the HTTP process."""

    def model_info(self, name: str | None = None) -> ModelInfo | None:
        """The served model of this name, else the first; None until the models are loaded."""
        ...

    def model_names(self) -> list[str]:
        """The ids of the served models; the first is the default."""
        ...

    def find_model(self, name: str) -> str | None:
        """The id of the served model with this id or alias, ignoring case; None if there is none."""
        ...

    def status(self) -> ServerStatus:
        """The current state; never waits."""
        ...

    async def submit(
        self, request: GenerationRequest, on_event: Callable[[Event], None] | None = None
    ) -> RequestHandle:
        """Admit a request, without waiting in the overflow queue.

        If the wait in the overflow queue times out, the handle's iterator raises `QueueFullError`.

        Args:
            on_event: called when an event arrives, before the consumer reads it.

        Raises:
            QueueFullError: the request queue and the overflow queue are full.
            UnavailableError: no engine is ready.
        """
        ...


async def generate_all(
    generator: ImageGenerator, request: GenerationRequest, on_event: Callable[[Event], None] | None = None
) -> list[ImageFinished]:
    """Generate all images of a request; returns them in order. For `on_event` see `ImageGenerator.submit`."""
    with await generator.submit(request, on_event) as handle:
        images = [event async for event in handle if isinstance(event, ImageFinished)]
    if len(images) != request.n:
        raise GenerationError("The engine ended the request before all images were generated.")
    return sorted(images, key=lambda image: image.index)
