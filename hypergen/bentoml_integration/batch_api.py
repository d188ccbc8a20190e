"""BentoML's batchable API: each item has the fields of an OpenAI request and gets one result.

BentoML passes on a batch without the requests of its items, and so without their clients. Therefore an item
stores its request's state when it is parsed, in the context of the request.
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
from hypergen.api.image_requests import draw, parse_request, require_model
from hypergen.api.request_body import MAX_ITEMS, JsonBounds
from hypergen.api.responses import write
from hypergen.config import Settings
from hypergen.engine_protocol import ImageGenerator
from hypergen.errors import GenerationError, RequestError, UnsupportedMediaTypeError
from hypergen.events import ImageFinished

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Call:
    """State shared by the items of one native request: whether the client disconnected, and the deadline."""

    disconnected: asyncio.Event
    deadline: float


_CALL: ContextVar[_Call] = ContextVar("call")


class ClientWatch:
    """ASGI middleware that gives the items of a native request its disconnect event and deadline.

    It accepts only JSON within the bounds: BentoML also parses other bodies, and fails on some of them.
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
        disconnected = asyncio.Event()

        async def receive_body() -> Message:
            if body:
                return {"type": "http.request", "body": body.pop(), "more_body": False}
            await disconnected.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            disconnected.set()

        _CALL.set(_Call(disconnected, scope["state"]["deadline"]))
        watching = asyncio.create_task(watch())
        try:
            await self._app(scope, receive_body, send)
        finally:
            watching.cancel()

    async def _read_body(self, receive: Receive) -> list[bytes]:
        """The whole body as one chunk.

        Raises:
            ClientGoneError: the client disconnected.
            RequestError: the body exceeds the bounds of JSON bodies.
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
    types = [value for name, value in scope["headers"] if name == b"content-type"]
    return scope["method"] != "POST" or [value.partition(b";")[0].strip().lower() for value in types] == [
        b"application/json"
    ]


class NativeItem(RootModel[dict[str, Any]]):
    """The fields of an OpenAI request, validated by the dialect, so that each item fails alone."""

    _call: _Call = PrivateAttr(default_factory=_CALL.get)

    async def wait_for_disconnect(self) -> None:
        await self._call.disconnected.wait()

    @property
    def deadline(self) -> float:
        """In seconds of the event loop's clock."""
        return self._call.deadline


NativeItems = Annotated[list[NativeItem], Field(max_length=MAX_ITEMS)]


class NativeImage(BaseModel):
    """One image."""

    b64_json: str = Field(description="the file, base64")
    seed: int = Field(description="the seed that generates this image alone")


class NativeResult(BaseModel):
    """The result of one item: images, or the status and error of the OpenAI route."""

    status: int = 200
    images: list[NativeImage] = []
    error: dict[str, Any] | None = None


async def generate_item(generator: ImageGenerator, settings: Settings, item: NativeItem) -> NativeResult:
    """Generate one item of a batch. It fails alone: an exception would fail the whole batch."""
    try:
        body = {name: value for name, value in item.root.items() if value is not None}
        model_info = require_model(generator, body.get(GENERATIONS.model_field))
        item_id = f"item_{uuid.uuid4().hex}"
        request = await parse_request(
            GENERATIONS, body, model_info, settings, item_id, item.wait_for_disconnect, item.deadline
        )
        request.refuse_stream()
        images = await draw(generator, request.generation, item.wait_for_disconnect(), item.deadline)
    except ClientGoneError:
        return NativeResult(status=CLIENT_GONE)
    except Exception as error:  # the edge of the HTTP process, for one item
        if not isinstance(error, RequestError):
            logger.exception("An item of the native API failed.")
            error = GenerationError("The server failed on this item; see its log.")
        return _failed(error)
    return NativeResult(images=await write(_with_base64, images))


def _with_base64(images: list[ImageFinished]) -> list[NativeImage]:
    """The images as in the response; takes milliseconds per megabyte."""
    return [
        NativeImage(b64_json=base64.b64encode(image.data).decode("ascii"), seed=image.seed)
        for image in images
    ]


def _failed(error: RequestError) -> NativeResult:
    return NativeResult(status=status_of(error), error=error_body(error)["error"])
