"""The engine as the HTTP process sees it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from hypergen.errors import GenerationError
from hypergen.events import Event, GeneratorStatus, ImageFinished, Outlook
from hypergen.model_info import ModelDescription
from hypergen.request import GenerationRequest


class ImageGenerator(Protocol):
    """Whoever draws, as the HTTP half sees it: the pool of engine processes."""

    def describe(self, name: str | None = None) -> ModelDescription | None:
        """The served model of this name, else the first; None until they are loaded."""
        ...

    def status(self) -> GeneratorStatus:
        """The state right now; never waits."""
        ...

    def outlook(self, request_id: str) -> Outlook | None:
        """How things stand for a request that waits; None if it does not, or not any more."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Draw; yields events until the last `ImageFinished`. Closing the generator cancels the request.

        Raises:
            RequestError: from the generator, when the request cannot be finished.
        """
        ...


async def draw_all(generator: ImageGenerator, request: GenerationRequest) -> list[ImageFinished]:
    """Draw every image of a request and give them back in order."""
    images: list[ImageFinished] = []
    events = generator.generate(request)
    try:
        async for event in events:
            if isinstance(event, ImageFinished):
                images.append(event)
    finally:
        await events.aclose()
    if len(images) != request.n:
        raise GenerationError("The engine ended the request before all pictures were drawn.")
    return sorted(images, key=lambda image: image.index)
