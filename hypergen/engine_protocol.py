"""The engine as the HTTP process sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self

from hypergen.errors import GenerationError
from hypergen.events import Event, ImageFinished, QueuePosition, RequestState, ServerStatus
from hypergen.model_info import ModelInfo
from hypergen.request import GenerationRequest


class RequestHandle(Protocol):
    """One submitted request. Its events come up to the last `ImageFinished`, or until it is cancelled, and
    are kept for one consumer, however slowly it reads. The end of a `with` block cancels the request.

    Raises:
        RequestError: instead of the next event, when the request cannot be finished.
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
        """None if it does not wait, or not any more."""
        ...

    def cancel(self) -> None:
        """Free its place in the queue and the engine at once; nothing happens if it has ended."""
        ...


class ImageGenerator(Protocol):
    """What generates images, as the HTTP half sees it: the pool of engine processes."""

    def model_info(self, name: str | None = None) -> ModelInfo | None:
        """The served model of this name, else the first; None until they are loaded."""
        ...

    def status(self) -> ServerStatus:
        """The state right now; never waits."""
        ...

    async def submit(
        self, request: GenerationRequest, on_event: Callable[[Event], None] | None = None
    ) -> RequestHandle:
        """Admit a request. This does not wait for the overflow queue: if the wait there ends with a refusal,
        the events raise `QueueFullError`.

        Args:
            on_event: called as each event arrives, whenever it is read.

        Raises:
            QueueFullError: there is no room, not even in the overflow queue.
            UnavailableError: no engine is ready.
        """
        ...


async def generate_all(generator: ImageGenerator, request: GenerationRequest) -> list[ImageFinished]:
    """Generate every image of a request and give them back in order."""
    with await generator.submit(request) as handle:
        images = [event async for event in handle if isinstance(event, ImageFinished)]
    if len(images) != request.n:
        raise GenerationError("The engine ended the request before all images were generated.")
    return sorted(images, key=lambda image: image.index)
