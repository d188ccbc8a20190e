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
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, PrivateAttr, RootModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hypergen.api.dialects.endpoints import GENERATIONS, IMAGE_FIELDS
from hypergen.api.errors import CLIENT_GONE, ClientGoneError, error_body, status_of
from hypergen.api.image_requests import check, draw, loaded
from hypergen.api.request_body import MAX_ITEMS, JsonBounds
from hypergen.api.responses import write
from hypergen.config import Settings
from hypergen.engine_protocol import ImageGenerator
from hypergen.errors import GenerationError, RequestError, UnsupportedMediaTypeError
from hypergen.events import ImageFinished

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Call:
    """What the items of one native request share: when their client has left, and their deadline."""

    left: asyncio.Event
    deadline: float


_CALL: ContextVar[_Call] = ContextVar("call")


class ClientWatch:
    """ASGI middleware that tells the items of a native request when their client hangs up, and by when they
    must be answered.

    Lets only JSON in, within its bounds: BentoML reads other bodies too, and fails on some of them.
    """

    def __init__(self, app: ASGIApp, path: str, max_text_bytes: int) -> None:
        self._app = app
        self._path = path
        self._max_text_bytes = max_text_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != self._path:
            await self._app(scope, receive, send)
            return
        if not _is_json(scope):
            raise UnsupportedMediaTypeError("Send the items as JSON, with 'Content-Type: application/json'.")
        body = await self._read_body(receive)
        left = asyncio.Event()

        async def receive_body() -> Message:
            if body:
                return {"type": "http.request", "body": body.pop(), "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()

        _CALL.set(_Call(left, scope["state"]["deadline"]))
        watching = asyncio.create_task(watch())
        try:
            await self._app(scope, receive_body, send)
        finally:
            watching.cancel()

    async def _read_body(self, receive: Receive) -> list[bytes]:
        """The whole body, in one piece.

        Raises:
            ClientGoneError: the client hung up before its end.
            RequestError: it is beyond the bounds of JSON bodies.
        """
        bounds, chunks = JsonBounds(self._max_text_bytes, IMAGE_FIELDS), list[bytes]()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            chunks.append(message.get("body", b""))
            bounds.feed(chunks[-1])
            more = message.get("more_body", False)
        return [b"".join(chunks)]


def _is_json(scope: Scope) -> bool:
    kinds = [value for name, value in scope["headers"] if name == b"content-type"]
    return scope["method"] != "POST" or [kind.partition(b";")[0].strip().lower() for kind in kinds] == [
        b"application/json"
    ]


class NativeItem(RootModel[dict[str, Any]]):
    """The fields of an OpenAI request, checked by the dialect and not here, so that each item fails alone."""

    _call: _Call = PrivateAttr(default_factory=_CALL.get)

    async def until_client_left(self) -> None:
        await self._call.left.wait()

    @property
    def deadline(self) -> float:
        """By the event loop's clock."""
        return self._call.deadline


NativeItems = Annotated[list[NativeItem], Field(max_length=MAX_ITEMS)]


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
        item_id = f"item_{uuid.uuid4().hex}"
        asked = await check(
            GENERATIONS, body, description, settings, item_id, item.until_client_left, item.deadline
        )
        asked.refuse_stream()
        images = await draw(generator, asked.generation, item.until_client_left(), item.deadline)
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
    return NativeResult(status=status_of(error), error=error_body(error)["error"])
