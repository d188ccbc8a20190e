"""The items of BentoML's own batchable API: the fields of an OpenAI request in, one result each out.

BentoML hands a batch over without telling which request, and so which client, an item came from. An item
therefore takes note itself, while it is read in the context of its request.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import uuid
from contextvars import ContextVar
from typing import Any

from pydantic import BaseModel, Field, PrivateAttr, RootModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hypergen.api.drawing import CLIENT_GONE, ClientGoneError, check, draw, loaded
from hypergen.api.errors import envelope, status_of
from hypergen.api.operations import GENERATIONS
from hypergen.api.writing import write
from hypergen.config import Settings
from hypergen.errors import GenerationError, RequestError, UnsupportedMediaTypeError
from hypergen.generation import ImageFinished, ImageGenerator

logger = logging.getLogger(__name__)


_CLIENT_LEFT: ContextVar[asyncio.Event | None] = ContextVar("client_left", default=None)


class ClientWatch:
    """ASGI middleware that tells the items of a native request when their client hangs up.

    Lets only JSON in: BentoML reads other bodies too, and fails on some of them.
    """

    def __init__(self, app: ASGIApp, path: str) -> None:
        self._app = app
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != self._path:
            await self._app(scope, receive, send)
            return
        if not _is_json(scope):
            raise UnsupportedMediaTypeError("Send the items as JSON, with 'Content-Type: application/json'.")
        body_read, left = asyncio.Event(), asyncio.Event()

        async def receive_body() -> Message:
            message = await receive()
            if not message.get("more_body"):
                body_read.set()
            return message

        async def watch() -> None:
            await body_read.wait()
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()

        _CLIENT_LEFT.set(left)
        watching = asyncio.create_task(watch())
        try:
            await self._app(scope, receive_body, send)
        finally:
            watching.cancel()


def _is_json(scope: Scope) -> bool:
    kinds = [value for name, value in scope["headers"] if name == b"content-type"]
    return scope["method"] != "POST" or [kind.partition(b";")[0].strip().lower() for kind in kinds] == [
        b"application/json"
    ]


class NativeItem(RootModel[dict[str, Any]]):
    """The fields of an OpenAI request, checked by the dialect and not here, so that each item fails alone."""

    _client_left: asyncio.Event | None = PrivateAttr(default_factory=_CLIENT_LEFT.get)

    async def until_client_left(self) -> None:
        await (self._client_left or asyncio.Event()).wait()


class NativeImage(BaseModel):
    """One picture."""

    b64_json: str = Field(description="the file, base64")
    seed: int = Field(description="the seed that draws this picture alone")


class NativeResult(BaseModel):
    """What became of one item: pictures, or the status and error that the OpenAI route would answer."""

    status: int = 200
    images: list[NativeImage] = []
    error: dict[str, Any] | None = None


async def draw_item(generator: ImageGenerator, settings: Settings, item: NativeItem) -> NativeResult:
    """Draw one item of a batch; it fails alone, because an exception would fail its batch-mates too."""
    try:
        body = {name: value for name, value in item.root.items() if value is not None}
        description = loaded(generator, body.get(GENERATIONS.model_field))
        asked = await check(GENERATIONS, body, description, settings, f"item_{uuid.uuid4().hex}")
        asked.refuse_stream()
        timeout_s = settings.queue.request_timeout_s
        images = await draw(generator, asked.generation, item.until_client_left(), timeout_s)
    except ClientGoneError:
        return NativeResult(status=CLIENT_GONE)
    except Exception as error:  # the edge of the HTTP half, for one item
        if not isinstance(error, RequestError):
            logger.exception("An item of the native API failed.")
            error = GenerationError("The server failed on this item; its log says why.")
        return _failed(error)
    return NativeResult(images=await write(_with_base64, images))


def _with_base64(images: list[ImageFinished]) -> list[NativeImage]:
    """The pictures as they are answered; takes milliseconds per megabyte."""
    return [
        NativeImage(b64_json=base64.b64encode(image.data).decode("ascii"), seed=image.seed)
        for image in images
    ]


def _failed(error: RequestError) -> NativeResult:
    status = status_of(error)
    return NativeResult(
        status=status, error=envelope(status, error.message, error.param, error.code)["error"]
    )
