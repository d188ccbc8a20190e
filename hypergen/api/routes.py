"""Routes: the paths of the API, each from the raw request to the answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Match, Mount
from starlette.types import Message, Receive, Scope, Send

from hypergen.api import openapi
from hypergen.api.auth import FILES_PREFIX
from hypergen.api.dialects.endpoint import Endpoint
from hypergen.api.dialects.endpoints import ENDPOINTS
from hypergen.api.errors import json_response
from hypergen.api.health import health_body
from hypergen.api.image_requests import answer
from hypergen.api.job_routes import add_job_routes
from hypergen.api.jobs import Jobs
from hypergen.api.schemas import Health, Model, ModelList
from hypergen.config import Settings
from hypergen.engine_protocol import ImageGenerator
from hypergen.errors import NotFoundError
from hypergen.images.storage import ImageStorage
from hypergen.served_model import ServedModel

_FILE_HEADERS = {
    "Cache-Control": "private, max-age=3600, immutable",
    "Content-Security-Policy": "sandbox; default-src 'none'",
}


_GONE = "There is no such image, or its time is over."


class StoredFile(FileResponse):
    """A stored image, whose time may end between its look-up and its first byte."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held: list[Message] = []
        started = False

        async def send_when_open(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":  # comes before the file is opened
                held.append(message)
                return
            started = True
            while held:
                await send(held.pop())
            await send(message)

        try:
            await super().__call__(scope, receive, send_when_open)
        except (FileNotFoundError, RuntimeError):
            if started:
                raise
            raise NotFoundError(_GONE) from None


def create_router(
    settings: Settings,
    generator: ImageGenerator,
    storage: ImageStorage,
    jobs: Jobs,
    models: Sequence[ServedModel],
) -> APIRouter:
    """All routes of the API."""
    router = APIRouter(redirect_slashes=False)

    def add(endpoint: Endpoint) -> None:
        @router.post(endpoint.path, openapi_extra=endpoint.openapi)
        async def create_images(request: Request) -> Response:
            return await answer(request, endpoint, settings, generator, storage)

    for endpoint in ENDPOINTS:
        add(endpoint)
    add_job_routes(router, settings, generator, jobs)

    @router.get(
        "/v1/models",
        summary="The models of this server",
        openapi_extra=openapi.server_route("listModels", ModelList, 200),
    )
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [_model(model.id) for model in models]})

    @router.get(
        "/v1/models/{model:path}",
        summary="One model",
        openapi_extra=openapi.server_route("retrieveModel", Model, 200),
    )
    async def get_model(model: str) -> Response:
        # Ids may start with a slash, which a proxy or client may have dropped or doubled.
        model_id = next((known.id for known in models if known.id.strip("/") == model.strip("/")), None)
        model_id = model_id or next((known.id for known in models if model in known.aliases), None)
        if model_id is None:
            raise NotFoundError(
                f"This server has no model '{model[:100]}'.", param="model", code="model_not_found"
            )
        return json_response(_model(model_id))

    @router.head(FILES_PREFIX + "{name}", include_in_schema=False)
    @router.get(
        FILES_PREFIX + "{name}", summary="A picture, without a key", openapi_extra=openapi.image_file()
    )
    async def get_file(name: str) -> Response:
        stored = storage.get(name)
        if stored is None:
            raise NotFoundError(_GONE)
        return StoredFile(stored.path, media_type=stored.media_type, headers=_FILE_HEADERS)

    @router.get(
        "/health",
        summary="How the server is, without a key",
        openapi_extra=openapi.server_route("health", Health, 200, 503),
    )
    async def health() -> Response:
        status = generator.status()
        body = health_body(generator, status, models, settings.engine.device or "auto")
        return json_response(body, 200 if status.state == "ready" else 503)

    @router.api_route(
        "/{path:path}",
        methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY"],
        include_in_schema=False,
    )
    async def not_found(request: Request, path: str) -> Response:
        # This route takes every path, so that BentoML's own pages and plain-text errors do not show; a known
        # path with another method lands here too. BentoML's routes count up to the mount of this app.
        outer = takewhile(lambda route: not isinstance(route, Mount), request.scope["router"].routes)
        methods: set[str] = set()
        for route in [*outer, *request.app.router.routes, *router.routes]:
            if route.matches(request.scope)[0] is Match.PARTIAL:
                methods |= getattr(route, "methods", None) or set()
        if methods:
            headers = {"Allow": ", ".join(sorted(methods))}
            raise HTTPException(405, f"{request.method} is not allowed here", headers)
        raise NotFoundError("There is no such path; /docs lists those that there are.")

    return router


def _model(model_id: str) -> dict[str, Any]:
    return {"id": model_id, "object": "model", "created": int(time.time()), "owned_by": "hypergen"}
