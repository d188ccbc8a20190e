"""BentoML's batchable API: each item has the fields of an OpenAI request and gets one result.

BentoML passes on a batch without the HTTP requests of its items. Therefore an item stores the state of its
request when it is parsed, in the context of the request.
"""

from __future__ import annotations

import asyncio
import base64
import codecs
import logging
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, RootModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hypergen.api.dialects.endpoints import GENERATIONS, IMAGE_FIELDS
from hypergen.api.errors import CLIENT_CLOSED_REQUEST, ClientDisconnectedError, error_body, status_of
from hypergen.api.image_requests import choose_model, generate_images, parse_request
from hypergen.api.request_body import MAX_ITEMS, JsonBounds
from hypergen.api.responses import write
from hypergen.api.schemas import BatchImage, BatchResult, ErrorDetail
from hypergen.config import Settings
from hypergen.engine_protocol import ImageGenerator
from hypergen.errors import GenerationError, RequestError, UnsupportedMediaTypeError
from hypergen.events import ImageFinished
from hypergen.metrics import outcome_of, record_rejection, record_request
from hypergen.request import ApiKey

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Call:
    """State of one request, shared by its items; `disconnected` is of its client."""

    disconnected: asyncio.Event
    deadline: float
    api_key: ApiKey


_CALL: ContextVar[_Call] = ContextVar("call")


class BatchContext:
    """ASGI middleware that provides the items of a request with its disconnect event and deadline.

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

        state = scope["state"]
        _CALL.set(_Call(disconnected, state["deadline"], state["api_key"]))
        watching = asyncio.create_task(watch())
        try:
            await self._app(scope, receive_body, send)
        finally:
            watching.cancel()

    async def _read_body(self, receive: Receive) -> list[bytes]:
        """The whole body as one chunk, without a byte order mark.

        Raises:
            ClientDisconnectedError: the client disconnected.
            RequestError: the body exceeds the bounds of JSON bodies.
        """
        bounds, chunks = JsonBounds(self._max_text_bytes, IMAGE_FIELDS), list[bytes]()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnectedError
            chunks.append(message.get("body", b""))
            bounds.feed(chunks[-1])
            more = message.get("more_body", False)
        return [b"".join(chunks).removeprefix(codecs.BOM_UTF8)]


def _is_json(scope: Scope) -> bool:
    types = [value for name, value in scope["headers"] if name == b"content-type"]
    return scope["method"] != "POST" or [value.partition(b";")[0].strip().lower() for value in types] == [
        b"application/json"
    ]


class BatchItem(RootModel[dict[str, Any]]):
    """The fields of an OpenAI request, validated by the dialect, so that each item fails alone."""

    _call: _Call = PrivateAttr(default_factory=_CALL.get)

    async def wait_for_disconnect(self) -> None:
        await self._call.disconnected.wait()

    @property
    def api_key(self) -> ApiKey:
        return self._call.api_key

    @property
    def deadline(self) -> float:
        """In seconds of the event loop's clock."""
        return self._call.deadline


BatchItems = Annotated[list[BatchItem], Field(max_length=MAX_ITEMS)]


async def generate_item(generator: ImageGenerator, settings: Settings, item: BatchItem) -> BatchResult:
    """Generate one item of a batch.

    Errors are returned, because an exception would fail the whole batch.
    """
    item_id = f"item_{uuid.uuid4().hex}"
    started, model = time.monotonic(), None
    result = BatchResult(status=CLIENT_CLOSED_REQUEST, images=[])
    try:
        body = {name: value for name, value in item.root.items() if value is not None}
        model_info = choose_model(generator, body, GENERATIONS, settings)
        validated = await parse_request(
            GENERATIONS,
            body,
            model_info,
            settings,
            item_id,
            item.api_key,
            item.wait_for_disconnect,
            item.deadline,
        )
        validated.reject_stream()
        model = validated.generation.model
        images = await generate_images(
            generator, validated.generation, item.wait_for_disconnect(), item.deadline
        )
        result = BatchResult(status=200, images=await write(_to_base64, images))
    except ClientDisconnectedError:
        pass
    except Exception as error:  # Isolate the failure: only this item fails.
        if not isinstance(error, RequestError):
            logger.exception("%s of the batchable API failed.", item_id)
            error = GenerationError("The server failed on this item; see its log.")
        result = _failed(error)
        if result.status in (429, 503):
            record_rejection(error.code)
    seconds = time.monotonic() - started
    record_request("/generate", model, item.api_key.name, outcome_of(result.status), seconds)
    return result


def _to_base64(images: list[ImageFinished]) -> list[BatchImage]:
    """The images for the response; takes milliseconds per megabyte."""
    return [
        BatchImage(b64_json=base64.b64encode(image.data).decode("ascii"), seed=image.seed) for image in images
    ]


def _failed(error: RequestError) -> BatchResult:
    detail = ErrorDetail.model_validate(error_body(error)["error"])
    return BatchResult(status=status_of(error), images=[], error=detail)
