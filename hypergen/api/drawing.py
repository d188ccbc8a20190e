"""From a checked request to its answer: draw, notice a client that leaves, keep what gets a `url`."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from hypergen.api.auth import FILES_PREFIX
from hypergen.api.checks import Asked
from hypergen.api.forms import is_form, read_form
from hypergen.api.limits import read_json_object
from hypergen.api.operations import Operation
from hypergen.api.streaming import in_frames
from hypergen.api.writing import in_slices, write
from hypergen.config import Settings
from hypergen.errors import DeadlineExceededError, InvalidRequestError, RequestError, UnavailableError
from hypergen.generation import (
    GenerationRequest,
    ImageFinished,
    ImageGenerator,
    ModelDescription,
    Preview,
    draw_all,
)
from hypergen.images.codec import FORMATS
from hypergen.images.storage import ImageStorage

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
CLIENT_GONE = 499  # nobody reads it; the number is nginx's and stands in the log

_PICTURES = frozenset({"image", "images", "mask", "control_image", "controlnet_image"})
# A decoded picture of 40 megapixels takes 160 MB, so only two are decoded at a time.
_DECODERS = ThreadPoolExecutor(2, "decode")


class ClientGoneError(Exception):
    """The client hung up before its answer."""


async def read_body(request: Request, operation: Operation) -> dict[str, Any]:
    """The fields of a request, from JSON or from a form where the operation takes one."""
    if operation.form is not None and is_form(request):
        return await read_form(request, operation.form)
    return await read_json_object(request, or_form=operation.form is not None)


async def check(
    operation: Operation,
    body: dict[str, Any],
    description: ModelDescription,
    settings: Settings,
    request_id: str,
) -> Asked:
    """Check a body and resolve its defaults; pictures in it are decoded in a thread."""
    arguments = (body, description, settings.server, request_id)
    if _PICTURES.isdisjoint(body):
        return operation.to_request(*arguments)
    return await asyncio.get_running_loop().run_in_executor(_DECODERS, operation.to_request, *arguments)


async def answer(
    request: Request,
    operation: Operation,
    settings: Settings,
    generator: ImageGenerator,
    storage: ImageStorage,
) -> Response:
    """One image request, from its body to its answer."""
    started = time.monotonic()
    loaded(generator)
    body = await read_body(request, operation)
    description = loaded(generator, body.get(operation.model_field))
    asked = await check(operation, body, description, settings, request.state.request_id)
    body.clear()  # pictures in base64 would be held as long as the request waits
    # A strange Host matters to answers with addresses alone.
    base = "" if asked.response_format == "b64_json" else url_base(request, settings)
    timeout_s = settings.queue.request_timeout_s
    if operation.to_frame is not None and asked.stream:
        to_frame = partial(operation.to_frame, asked, int(time.time()))
        return await stream(generator, asked, to_frame, _disconnected(request), timeout_s)
    try:
        images = await draw(generator, asked.generation, _disconnected(request), timeout_s)
    except InvalidRequestError as error:
        raise asked.in_its_words(error) from None
    if asked.price is not None:
        asked.price.count()
    if asked.response_format == "b64_json":
        urls = None
    else:
        urls = await asyncio.to_thread(store, storage, asked.generation, images, base)
    pieces = await write(operation.to_response, asked, images, urls, int(time.time()))
    response = in_pieces(pieces)
    response.headers["openai-processing-ms"] = str(max(1, round((time.monotonic() - started) * 1000)))
    shared = ",".join(str(image.shared_forwards) for image in images)
    response.headers["x-hypergen-shared-forwards"] = shared
    response.headers["server-timing"] = server_timing(images)
    response.headers.update(asked.headers)
    return response


def in_pieces(pieces: list[bytes]) -> StreamingResponse:
    """A JSON answer that is sent in slices."""
    response = StreamingResponse(in_slices(pieces), media_type="application/json")
    response.headers["content-length"] = str(sum(len(piece) for piece in pieces))
    return response


def loaded(generator: ImageGenerator, name: object = None) -> ModelDescription:
    """What requests are checked against: the served model of this name, else the first.

    Args:
        name: as it stands in a body that was not checked.

    Raises:
        UnavailableError: the models are not loaded yet, or could not be.
    """
    description = generator.describe(name if isinstance(name, str) else None)
    if description is None:
        state = generator.status().state
        words = {"failed": "The model could not be loaded; /health says why."}
        raise UnavailableError(words.get(state, "The model is still loading."), code=state, retry_after_s=5)
    return description


async def draw(
    generator: ImageGenerator,
    request: GenerationRequest,
    until_client_left: Awaitable[object],
    timeout_s: float,
) -> list[ImageFinished]:
    """Draw all pictures unless the client leaves or the time is over; either frees the place at once.

    Raises:
        ClientGoneError: nobody waits for the answer any more.
        DeadlineExceededError: the request took longer than the server allows.
    """
    drawing = asyncio.ensure_future(draw_all(generator, request))
    leaving = asyncio.ensure_future(until_client_left)
    try:
        await asyncio.wait([drawing, leaving], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if drawing.done():
            return drawing.result()
        if leaving.done():
            raise ClientGoneError
        raise DeadlineExceededError(f"The request was not finished within {timeout_s:g} s.")
    finally:
        await _cancel(drawing)
        await _cancel(leaving)


async def stream(
    generator: ImageGenerator,
    asked: Asked,
    to_frame: Callable[[Preview | ImageFinished], list[bytes]],
    until_client_left: Awaitable[object],
    timeout_s: float,
) -> Response:
    """Begin to draw, then answer with events as they come.

    Raises:
        ClientGoneError: nobody waits for the answer any more.
        RequestError: the request was not begun.
    """
    until = time.monotonic() + timeout_s
    events = generator.generate(asked.generation)
    first = asyncio.ensure_future(anext(events))
    leaving = asyncio.ensure_future(until_client_left)
    try:
        await asyncio.wait([first, leaving], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if first.done():
            return in_frames(first.result(), events, to_frame, until)
        if leaving.done():
            raise ClientGoneError
        raise DeadlineExceededError(f"The request was not begun within {timeout_s:g} s.")
    except InvalidRequestError as error:
        raise asked.in_its_words(error) from None
    finally:
        await _cancel(leaving)
        if not first.done():
            await _cancel(first)
            await events.aclose()


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
    kind = FORMATS[request.output_format]
    return [
        base + FILES_PREFIX + storage.put(image.data, kind.extension, kind.media_type) for image in images
    ]


def url_base(request: Request, settings: Settings) -> str:
    """Scheme, host and port of `url` results: the public ones, else those that the request came to.

    Raises:
        InvalidRequestError: the Host header is no plain host and port.
    """
    if settings.server.public_url:
        return settings.server.public_url.rstrip("/")
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        raise InvalidRequestError("The Host header names no host.", code="invalid_host")
    return f"{request.scope['scheme']}://{host}"


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: asyncio.Future[Any]) -> None:
    """End a task and wait until it has left what it held."""
    if not task.done():
        task.cancel()
        with suppress(asyncio.CancelledError, RequestError):
            await task
