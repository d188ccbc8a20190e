"""From a checked request to its answer: draw, notice a client that leaves, keep what gets a `url`."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from hypergen.api.auth import FILES_PREFIX
from hypergen.api.dialects.endpoint import Endpoint
from hypergen.api.dialects.endpoints import IMAGE_FIELDS
from hypergen.api.errors import ClientGoneError
from hypergen.api.hosts import is_named_host
from hypergen.api.multipart_form import is_form, read_form
from hypergen.api.outgoing_answers import Outgoing
from hypergen.api.request_body import read_json_object
from hypergen.api.responses import iter_chunks, write
from hypergen.api.sse import EventStream
from hypergen.api.validation import ValidatedRequest
from hypergen.config import Settings
from hypergen.engine_protocol import ImageGenerator, generate_all
from hypergen.errors import DeadlineExceededError, InvalidRequestError, UnavailableError
from hypergen.events import Event, ImageFinished, Preview
from hypergen.images.decoding import decoding_cancelled
from hypergen.images.encoding import OUTPUT_FORMATS
from hypergen.images.storage import ImageStorage
from hypergen.model_info import ModelInfo
from hypergen.request import GenerationRequest

logger = logging.getLogger(__name__)

# A decoded picture of 40 megapixels takes 160 MB, so only two are decoded at a time.
_DECODERS = ThreadPoolExecutor(2, "decode")
_Result = TypeVar("_Result")


async def read_body(request: Request, endpoint: Endpoint, settings: Settings) -> dict[str, Any]:
    """The fields of a request, from JSON or from a form where the endpoint takes one.

    Raises:
        ClientGoneError: the client hung up before the end of its body.
    """
    max_text_bytes = int(settings.server.max_text_body_mb * 1e6)
    try:
        if endpoint.form is not None and is_form(request):
            return await read_form(request, endpoint.form, max_text_bytes)
        return await read_json_object(request, endpoint.form is not None, max_text_bytes, IMAGE_FIELDS)
    except ClientDisconnect:
        raise ClientGoneError from None


async def parse_request(
    endpoint: Endpoint,
    body: dict[str, Any],
    description: ModelInfo,
    settings: Settings,
    request_id: str,
    until_client_left: Callable[[], Awaitable[object]],
    deadline: float,
) -> ValidatedRequest:
    """Check a body and resolve its defaults; input images in it are decoded in a thread, until the client
    leaves or the time is over.

    Raises:
        ClientGoneError: nobody waits for the answer any more.
        RequestError: the body is not right, or the deadline passed.
    """
    arguments = (body, description, settings.server, request_id)
    if endpoint.image_fields.isdisjoint(body):
        return endpoint.to_request(*arguments)
    cancelled = threading.Event()
    context = contextvars.copy_context()
    context.run(decoding_cancelled.set, cancelled)
    decoding = asyncio.get_running_loop().run_in_executor(
        _DECODERS, lambda: context.run(endpoint.to_request, *arguments)
    )
    try:
        return await unless_client_leaves(decoding, until_client_left(), deadline)
    finally:
        cancelled.set()


async def answer(
    request: Request,
    endpoint: Endpoint,
    settings: Settings,
    generator: ImageGenerator,
    storage: ImageStorage,
) -> Response:
    """One image request, from its body to its answer."""
    started = time.monotonic()
    require_model(generator)
    body = await read_body(request, endpoint, settings)
    description = require_model(generator, body.get(endpoint.model_field))
    deadline: float = request.state.deadline
    until_client_left = partial(disconnected, request)
    asked = await parse_request(
        endpoint, body, description, settings, request.state.request_id, until_client_left, deadline
    )
    body.clear()  # input images in base64 would be held as long as the request waits
    request.state.body.release()
    base = url_base(request, settings, asked)  # before anything is generated that could not be answered
    outgoing: Outgoing = request.state.outgoing
    if endpoint.to_sse_event is not None and asked.stream:
        to_sse_event = partial(endpoint.to_sse_event, asked.without_input_images(), int(time.time()))
        return await stream(generator, asked, to_sse_event, until_client_left, deadline, outgoing)
    try:
        images = await draw(generator, asked.generation, until_client_left(), deadline)
    except InvalidRequestError as error:
        raise asked.with_client_field_names(error) from None
    asked = asked.without_input_images()
    if asked.price is not None:
        asked.price.count()
    urls = None if base is None else await asyncio.to_thread(store, storage, asked.generation, images, base)
    pieces = await write(endpoint.to_response, asked, images, urls, int(time.time()))
    response = chunked_json_response(pieces, outgoing)
    response.headers["openai-processing-ms"] = str(max(1, round((time.monotonic() - started) * 1000)))
    shared = ",".join(str(image.shared_forwards) for image in images)
    response.headers["x-hypergen-shared-forwards"] = shared
    response.headers["server-timing"] = server_timing(images)
    response.headers.update(asked.headers)
    return response


def chunked_json_response(pieces: list[bytes], outgoing: Outgoing) -> StreamingResponse:
    """A JSON answer that is sent in slices."""
    size = sum(len(piece) for piece in pieces)
    outgoing.hold(size)
    response = StreamingResponse(iter_chunks(pieces), media_type="application/json")
    response.headers["content-length"] = str(size)
    return response


def require_model(generator: ImageGenerator, name: object = None) -> ModelInfo:
    """What requests are checked against: the served model of this name, else the first.

    Args:
        name: as it stands in a body that was not checked.

    Raises:
        UnavailableError: the models are not loaded yet, or could not be.
    """
    description = generator.model_info(name if isinstance(name, str) else None)
    if description is None:
        state = generator.status().state
        words = {"failed": "The model could not be loaded; /health says why."}
        raise UnavailableError(words.get(state, "The model is still loading."), code=state, retry_after_s=5)
    return description


async def draw(
    generator: ImageGenerator,
    request: GenerationRequest,
    until_client_left: Awaitable[object],
    deadline: float,
) -> list[ImageFinished]:
    """Draw all pictures unless the client leaves or the time is over; either frees the place at once.

    Args:
        deadline: by the event loop's clock.

    Raises:
        ClientGoneError: nobody waits for the answer any more.
        DeadlineExceededError: the request took longer than the server allows.
    """
    drawing = asyncio.ensure_future(generate_all(generator, request))
    return await unless_client_leaves(drawing, until_client_left, deadline)


async def stream(
    generator: ImageGenerator,
    asked: ValidatedRequest,
    to_sse_event: Callable[[Preview | ImageFinished], list[bytes]],
    until_client_left: Callable[[], Awaitable[object]],
    deadline: float,
    outgoing: Outgoing,
) -> Response:
    """Submit a request, then answer with its events as they come.

    Raises:
        ClientGoneError: nobody waits for the answer any more.
        RequestError: it was refused, or failed before its first event.
    """

    def hold(event: Event) -> None:
        """A client that reads slowly holds memory, which is counted, and never the engine."""
        if isinstance(event, Preview | ImageFinished):
            outgoing.hold(len(event.data))

    handle = await generator.submit(asked.generation, on_event=hold)
    try:
        first = asyncio.ensure_future(anext(handle))
        event = await unless_client_leaves(first, until_client_left(), deadline)
    except BaseException as error:
        handle.cancel()
        if isinstance(error, InvalidRequestError):
            raise asked.with_client_field_names(error) from None
        raise
    return EventStream(event, handle, to_sse_event, outgoing, deadline)


async def unless_client_leaves(
    work: asyncio.Future[_Result], until_client_left: Awaitable[object], deadline: float
) -> _Result:
    """What the work gives; it is cancelled when the client leaves or the time is over.

    Args:
        deadline: by the event loop's clock.

    Raises:
        ClientGoneError: nobody waits for the answer any more.
        DeadlineExceededError: the time is over.
    """
    leaving = asyncio.ensure_future(until_client_left)
    try:
        timeout_s = max(0.0, deadline - asyncio.get_running_loop().time())
        await asyncio.wait([work, leaving], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        if leaving.done():
            raise ClientGoneError
        raise DeadlineExceededError("The request was not finished within its time.")
    finally:
        await _cancel(work)
        await _cancel(leaving)


def server_timing(images: list[ImageFinished]) -> str:
    """The `Server-Timing` header: milliseconds in the engine and in its encoding threads.

    Both are of the picture that was finished last, because the answer waited for it and pictures of one
    request are drawn and encoded side by side: what the request took beyond their sum was spent on HTTP, in
    the queue before the engine, and on waiting for an encoding thread.

    Source: https://www.w3.org/TR/server-timing/.
    """
    last = max(images, key=lambda image: image.engine_s + image.encode_s)
    return f"engine;dur={last.engine_s * 1000:.1f}, encode;dur={last.encode_s * 1000:.1f}"


def store(
    storage: ImageStorage, request: GenerationRequest, images: list[ImageFinished], base: str
) -> list[str]:
    """Keep the pictures' files; returns their addresses."""
    kind = OUTPUT_FORMATS[request.output_format]
    return [base + storage.put(image.data, kind.extension, kind.media_type) for image in images]


def url_base(request: Request, settings: Settings, asked: ValidatedRequest) -> str | None:
    """What comes before a stored image's name in `url` results: the public URL, else scheme, host and port
    that the request came to. None for answers without addresses: where none are asked for, and where the
    operator has not named that host, because whoever sends a strange one could have its address given to
    others.

    Raises:
        InvalidRequestError: only addresses are asked for, and there are none.
    """
    if asked.response_format == "b64_json":
        return None
    if settings.server.public_url:
        return settings.server.public_url.rstrip("/") + FILES_PREFIX
    host = request.headers.get("host", "")
    local_address, _ = request.scope.get("server") or (None, None)
    if is_named_host(host, settings.server, local_address):
        return f"{request.scope['scheme']}://{host}{FILES_PREFIX}"
    _warn_of_host()
    if asked.response_format == "url":
        raise InvalidRequestError(
            "'response_format' url: this server does not know itself by the Host of this request, which "
            "--public-url or --allowed-host would name; ask for 'b64_json'.",
            param="response_format",
            code="invalid_host",
        )
    return None


@cache
def _warn_of_host() -> None:
    logger.warning(
        "Requests come to a host that neither --public-url nor --allowed-host names: answers have no url."
    )


async def disconnected(request: Request) -> None:
    """Return when the client has left; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: asyncio.Future[Any]) -> None:
    """End a task and wait until it has left what it held."""
    if not task.done():
        task.cancel()
        # Not `await task`: its CancelledError could not be told from one that is meant for this task.
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()
