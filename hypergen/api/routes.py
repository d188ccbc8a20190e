"""Routes: the paths of the API, each from the raw request to the answer."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Iterable
from contextlib import suppress
from dataclasses import asdict
from itertools import takewhile
from typing import Any

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Match, Mount

from hypergen.api.auth import FILES_PREFIX
from hypergen.api.dialects import openai
from hypergen.api.errors import json_response
from hypergen.api.limits import read_json_object
from hypergen.config import Settings
from hypergen.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    NotFoundError,
    RequestError,
    UnavailableError,
)
from hypergen.generation import GenerationRequest, ImageFinished, ImageGenerator, ModelDescription, draw_all
from hypergen.images.codec import FORMATS
from hypergen.images.storage import ImageStorage

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
CLIENT_GONE = 499  # nobody reads it; the number is nginx's and stands in the log
_FILE_HEADERS = {
    "Cache-Control": "private, max-age=3600, immutable",
    "Content-Security-Policy": "sandbox; default-src 'none'",
    "X-Content-Type-Options": "nosniff",
}


class ClientGoneError(Exception):
    """The client hung up before its answer."""


def create_router(
    settings: Settings, generator: ImageGenerator, storage: ImageStorage, model_id: str
) -> APIRouter:
    """All routes of the API."""
    router = APIRouter(redirect_slashes=False)

    @router.post(
        "/v1/images/generations",
        summary="Draw pictures from a prompt",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": openai.ImagesBody.model_json_schema()}},
            }
        },
    )
    async def create_images(request: Request) -> Response:
        started = time.monotonic()
        description = loaded(generator)
        body = await read_json_object(request)
        asked = openai.to_request(body, description, settings.server, request.state.request_id)
        base = url_base(request, settings)
        timeout_s = settings.queue.request_timeout_s
        try:
            images = await draw(generator, asked.generation, _disconnected(request), timeout_s)
        except InvalidRequestError as error:
            error.param = asked.fields.get(error.param or "", error.param)
            raise
        if asked.response_format == "b64_json":
            urls = None
        else:
            urls = await asyncio.to_thread(store, storage, asked.generation, images, base)
        pieces = await asyncio.to_thread(openai.to_response, asked, images, urls, created=int(time.time()))
        answer = StreamingResponse(_one_by_one(pieces), media_type="application/json")
        answer.headers["content-length"] = str(sum(len(piece) for piece in pieces))
        answer.headers["openai-processing-ms"] = str(max(1, round((time.monotonic() - started) * 1000)))
        shared = ",".join(str(image.shared_forwards) for image in images)
        answer.headers["x-hypergen-shared-forwards"] = shared
        answer.headers["server-timing"] = server_timing(images)
        return answer

    @router.get("/v1/models", summary="The models of this server")
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [_model(model_id)]})

    @router.get("/v1/models/{model:path}", summary="One model")
    async def get_model(model: str) -> Response:
        # Ids may start with a slash, which a proxy or client may have dropped or doubled.
        if model.strip("/") != model_id.strip("/"):
            raise NotFoundError(
                f"This server has no model '{model[:100]}'.", param="model", code="model_not_found"
            )
        return json_response(_model(model_id))

    @router.head(FILES_PREFIX + "{name}", include_in_schema=False)
    @router.get(FILES_PREFIX + "{name}", summary="A picture, without a key")
    async def get_file(name: str) -> Response:
        stored = storage.get(name)
        if stored is None:
            raise NotFoundError("There is no such picture, or its time is over.")
        return FileResponse(stored.path, media_type=stored.media_type, headers=_FILE_HEADERS)

    @router.get("/health", summary="How the server is, without a key")
    async def health() -> Response:
        status = generator.status()
        description = generator.describe()
        words = {"ready": "healthy", "failed": "failed"}
        body: dict[str, Any] = {
            "status": words.get(status.state, status.state),
            "model": model_id,
            "queue_size": status.queue_size,
            # "auto" until the engine has chosen.
            "device": next((e.device for e in status.engines if e.device), settings.engine.device or "auto"),
            "running": status.running,
            "waiting": status.waiting,
            "at_the_door": status.at_the_door,
            "reason": status.reason,
            "samplers": list(description.samplers) if description else [],
            "engines": [_engine(asdict(engine)) for engine in status.engines],
        }
        return json_response(body, 200 if status.state == "ready" else 503)

    @router.api_route(
        "/{path:path}",
        methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"],
        include_in_schema=False,
    )
    async def not_found(request: Request, path: str) -> Response:
        # This route takes every path, so that BentoML's own pages and plain-text errors do not show; a known
        # path with another method lands here too. BentoML's routes count up to the mount of this app.
        outer = takewhile(lambda route: not isinstance(route, Mount), request.scope["router"].routes)
        for route in [*outer, *request.app.router.routes, *router.routes]:
            if route.matches(request.scope)[0] is Match.PARTIAL:
                methods: set[str] = getattr(route, "methods", None) or set()
                headers = {"Allow": ", ".join(sorted(methods))}
                raise HTTPException(405, f"{request.method} is not allowed here", headers)
        raise NotFoundError("There is no such path; /docs lists those that there are.")

    return router


def loaded(generator: ImageGenerator) -> ModelDescription:
    """What requests are checked against.

    Raises:
        UnavailableError: the model is not loaded yet, or could not be.
    """
    description = generator.describe()
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


async def _one_by_one(pieces: Iterable[bytes]) -> AsyncGenerator[bytes, None]:
    """Let the server wait for the client after each piece: handing over 40 MB at once blocks the loop."""
    for piece in pieces:
        yield piece


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: asyncio.Future[Any]) -> None:
    """End a task and wait until it has left what it held."""
    if not task.done():
        task.cancel()
        with suppress(asyncio.CancelledError, RequestError):
            await task


def _model(model_id: str) -> dict[str, Any]:
    return {"id": model_id, "object": "model", "created": int(time.time()), "owned_by": "hypergen"}


def _engine(status: dict[str, Any]) -> dict[str, Any]:
    forwards = status["forwards"]
    status["images_per_forward"] = round(status["image_steps"] / forwards, 3) if forwards else None
    return status
