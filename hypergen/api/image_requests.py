"""The handler of image requests: it parses the body, generates the images and builds the response."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from hypergen.api.dialects.endpoint import Endpoint
from hypergen.api.dialects.endpoints import IMAGE_FIELDS
from hypergen.api.disconnects import client_disconnected, run_until_disconnect
from hypergen.api.errors import ClientDisconnectedError
from hypergen.api.idempotency import HEADER, IdempotentRequests, idempotency_key
from hypergen.api.image_urls import store_images, suggest_base64, url_base, urls_of
from hypergen.api.multipart_form import is_form, read_form
from hypergen.api.outgoing_answers import OutgoingResponse
from hypergen.api.progress_report import ProgressReport, ProgressReporter
from hypergen.api.request_body import read_json_object
from hypergen.api.request_record import RequestRecord
from hypergen.api.responses import Answer, write
from hypergen.api.sse import EventStream
from hypergen.api.validated_request import ValidatedRequest
from hypergen.config import Settings
from hypergen.engine_protocol import ImageGenerator, generate_all
from hypergen.errors import InvalidRequestError, NotFoundError, UnavailableError
from hypergen.events import Event, ImageFinished, Preview
from hypergen.images.decoding import decoding_cancelled
from hypergen.images.storage import ImageStorage
from hypergen.model_info import ModelInfo
from hypergen.request import ApiKey, GenerationRequest

logger = logging.getLogger(__name__)

# Two threads: a decoded image of 40 megapixels takes 160 MB.
_DECODING_THREADS = ThreadPoolExecutor(2, "decode")


async def read_body(request: Request, endpoint: Endpoint, settings: Settings) -> dict[str, Any]:
    """The fields of a body: JSON, or a form if the endpoint accepts one.

    Raises:
        ClientDisconnectedError: the client disconnected before the end of the body.
        RequestError: the body is malformed, too large, or of an unsupported media type.
    """
    max_text_bytes = int(settings.server.max_text_body_mb * 1e6)
    try:
        if endpoint.accepts_forms and is_form(request):
            return await read_form(request, endpoint.body, IMAGE_FIELDS, max_text_bytes)
        return await read_json_object(request, endpoint.accepts_forms, max_text_bytes, IMAGE_FIELDS)
    except ClientDisconnect:
        raise ClientDisconnectedError from None


async def parse_request(
    endpoint: Endpoint,
    body: dict[str, Any],
    model_info: ModelInfo,
    settings: Settings,
    request_id: str,
    api_key: ApiKey,
    wait_for_disconnect: Callable[[], Awaitable[object]],
    deadline: float,
) -> ValidatedRequest:
    """Validate a body and resolve its defaults.

    A body with input images is parsed in a thread, because decoding them takes long.

    Raises:
        ClientDisconnectedError: the client disconnected.
        RequestError: the body is invalid, or the deadline has passed.
    """
    unknown = endpoint.unknown_fields(body)
    if unknown and settings.server.strict:
        name = unknown[0][:100]
        raise InvalidRequestError(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
    arguments = (body, model_info, settings.server, request_id)
    if endpoint.image_fields.isdisjoint(body):
        return endpoint.to_request(*arguments).of_request(api_key, unknown)
    cancelled = threading.Event()
    context = contextvars.copy_context()
    context.run(decoding_cancelled.set, cancelled)
    decoding = asyncio.get_running_loop().run_in_executor(
        _DECODING_THREADS, lambda: context.run(endpoint.to_request, *arguments)
    )
    try:
        validated = await run_until_disconnect(decoding, wait_for_disconnect(), deadline)
        return validated.of_request(api_key, unknown)
    finally:
        cancelled.set()


async def validate_request(
    request: Request,
    endpoint: Endpoint,
    body: dict[str, Any],
    generator: ImageGenerator,
    settings: Settings,
    wait_for_disconnect: Callable[[], Awaitable[object]],
) -> ValidatedRequest:
    """`parse_request` with the model that the body names; the body is empty afterwards."""
    model_info = choose_model(generator, body, endpoint, settings)
    validated = await parse_request(
        endpoint,
        body,
        model_info,
        settings,
        request.state.request_id,
        request.state.api_key,
        wait_for_disconnect,
        request.state.deadline,
    )
    vocabulary = model_info.vocabulary
    if vocabulary and (understood := vocabulary.understood(validated.generation.prompt)):
        line = "The model knows no word of the prompt of request %s; it understands '%s'."
        logger.info(line, request.state.request_id, understood)
        validated = replace(validated, understood_prompt=understood)
    request.state.record.set_generation(validated.generation)
    body.clear()  # or the base64 of input images would stay in memory while the request waits
    request.state.body.release()
    return validated


async def handle_image_request(
    request: Request,
    endpoint: Endpoint,
    settings: Settings,
    generator: ImageGenerator,
    storage: ImageStorage,
    idempotent: IdempotentRequests,
) -> Response:
    """Handle one image request, from its body to its response."""
    started = time.monotonic()
    require_model(generator)
    key = idempotency_key(request)
    body = await read_body(request, endpoint, settings)
    outgoing: OutgoingResponse = request.state.outgoing
    if endpoint.to_sse_event is not None and body.get("stream") is True:
        if key is not None:
            raise InvalidRequestError(
                f"'{HEADER}' cannot be combined with 'stream': a stream cannot be repeated.", param=HEADER
            )
        return await stream_images(request, endpoint, body, endpoint.to_sse_event, settings, generator)

    async def work(wait_for_disconnect: Callable[[], Awaitable[object]]) -> Answer:
        return await answer_with_images(
            request, endpoint, body, settings, generator, storage, wait_for_disconnect, started
        )

    answer = await idempotent.answer(request, key, endpoint.path, body, work)
    return answer.to_response(outgoing)


async def answer_with_images(
    request: Request,
    endpoint: Endpoint,
    body: dict[str, Any],
    settings: Settings,
    generator: ImageGenerator,
    storage: ImageStorage,
    wait_for_disconnect: Callable[[], Awaitable[object]],
    started: float,
) -> Answer:
    """Generate the images of a body.

    Args:
        started: when the handling of the request started, monotonic.
    """
    validated = await validate_request(request, endpoint, body, generator, settings, wait_for_disconnect)
    record: RequestRecord = request.state.record
    base = url_base(request, settings, validated)  # before generation, because it may reject the request
    if base is not None:
        with suggest_base64():
            storage.refuse_while_away()
    try:
        images = await generate_images(
            generator,
            validated.generation,
            wait_for_disconnect(),
            request.state.deadline,
            record.times.observe,
        )
    except InvalidRequestError as error:
        raise validated.with_client_field_names(error) from None
    validated = validated.without_input_images()
    urls = None
    if base is not None:
        with suggest_base64():
            names = await store_images(storage, validated.generation, images)
            urls = await urls_of(storage, names, base)
    pieces = await write(endpoint.to_response, validated, images, urls, int(time.time()))
    headers = {
        "openai-processing-ms": str(max(1, round((time.monotonic() - started) * 1000))),
        "x-hypergen-shared-forwards": ",".join(str(image.shared_forwards) for image in images),
        "server-timing": server_timing(images),
        **validated.response_headers,
    }
    return Answer(200, headers, pieces, validated.generation.model, record.request_id)


def choose_model(
    generator: ImageGenerator, body: dict[str, Any], endpoint: Endpoint, settings: Settings
) -> ModelInfo:
    """The model that a body names, else the first.

    A single model answers to every name, as clients of hosted APIs send names of hosted models.

    Args:
        body: not validated.

    Raises:
        NotFoundError: several models are served, and none has this name.
        UnavailableError: the models are still loading, or loading failed.
    """
    name, names = body.get(endpoint.model_field), generator.model_names()
    if not isinstance(name, str) or not name:
        return require_model(generator)
    if len(names) > 1 and settings.server.unknown_model == "error" and generator.find_model(name) is None:
        raise NotFoundError(
            f"'{endpoint.model_field}': this server has no model '{name[:100]}'; it has {', '.join(names)}.",
            param=endpoint.model_field,
            code="model_not_found",
        )
    return require_model(generator, name)


def require_model(generator: ImageGenerator, name: str | None = None) -> ModelInfo:
    """The served model of this name, else the first.

    Raises:
        UnavailableError: the models are still loading, or loading failed.
    """
    model_info = generator.model_info(name)
    if model_info is None:
        state = generator.status().state
        messages = {"failed": "The model could not be loaded; /health has the reason."}
        raise UnavailableError(
            messages.get(state, "The model is still loading."), code=state, retry_after_s=5
        )
    return model_info


async def generate_images(
    generator: ImageGenerator,
    request: GenerationRequest,
    disconnected: Awaitable[object],
    deadline: float,
    on_event: Callable[[Event], None] | None = None,
) -> list[ImageFinished]:
    """Generate all images; cancel the request if the client disconnects or the deadline passes.

    Args:
        disconnected: returns when the client has disconnected.
        deadline: time of the event loop's clock.
        on_event: see `ImageGenerator.submit`.

    Raises:
        ClientDisconnectedError: the client disconnected.
        DeadlineExceededError: the deadline has passed.
    """
    generating = asyncio.ensure_future(generate_all(generator, request, on_event))
    return await run_until_disconnect(generating, disconnected, deadline)


async def stream_images(
    request: Request,
    endpoint: Endpoint,
    body: dict[str, Any],
    to_sse_event: Callable[[Any, int, Preview | ImageFinished | ProgressReport], list[bytes]],
    settings: Settings,
    generator: ImageGenerator,
) -> Response:
    """Submit the request of a body; the response streams its events.

    With `stream_progress` it starts at once, with the place in the queue.

    Raises:
        ClientDisconnectedError: the client disconnected before the first event.
        RequestError: the request was rejected, or failed before its first event.
    """
    wait_for_disconnect = partial(client_disconnected, request)
    validated = await validate_request(request, endpoint, body, generator, settings, wait_for_disconnect)
    url_base(request, settings, validated)  # rejects a `url`, as without a stream
    record: RequestRecord = request.state.record
    outgoing: OutgoingResponse = request.state.outgoing

    def count(event: Event) -> None:
        """Count the event's memory until it is sent: a slow client must not slow down the engine."""
        record.times.observe(event)
        if isinstance(event, Preview | ImageFinished):
            outgoing.add_pending(len(event.data))

    handle = await generator.submit(validated.generation, on_event=count)
    event = None
    reporter = ProgressReporter(handle) if validated.stream_progress else None
    if reporter is None:
        try:
            first = asyncio.ensure_future(anext(handle))
            event = await run_until_disconnect(first, wait_for_disconnect(), request.state.deadline)
        except BaseException as error:
            handle.cancel()
            if isinstance(error, InvalidRequestError):
                raise validated.with_client_field_names(error) from None
            raise
    encode = partial(to_sse_event, validated.without_input_images(), int(time.time()))
    response = EventStream(
        event,
        handle,
        encode,
        outgoing,
        request.state.deadline,
        record,
        reporter,
        validated.with_client_field_names,
    )
    response.headers.update(validated.response_headers)
    return response


def server_timing(images: list[ImageFinished]) -> str:
    """The `Server-Timing` header: milliseconds in the engine and in the encoding threads.

    Both are those of the image that finished last, because images of one request run in parallel. The rest of
    the request's time was spent on HTTP, in the request queue, and on waiting for an encoding thread.

    Source: https://www.w3.org/TR/server-timing/.
    """
    last = max(images, key=lambda image: image.engine_s + image.encode_s)
    return f"engine;dur={last.engine_s * 1000:.1f}, encode;dur={last.encode_s * 1000:.1f}"
