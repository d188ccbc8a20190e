"""The routes of the API."""

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
from hypergen.api.idempotency import IdempotentRequests
from hypergen.api.image_requests import handle_image_request
from hypergen.api.job_routes import add_job_routes
from hypergen.api.job_store import JobStore
from hypergen.api.schemas import Health, Model, ModelList
from hypergen.api.web_pages import add_web_pages
from hypergen.config import Settings
from hypergen.engine_protocol import ImageGenerator
from hypergen.errors import NotFoundError
from hypergen.images.storage import ImageStorage
from hypergen.served_model import ServedModel

_FILE_HEADERS = {
    "Cache-Control": "private, max-age=3600, immutable",
    "Content-Security-Policy": "sandbox; default-src 'none'",
}
_IMAGE_NOT_FOUND = "The image does not exist or has expired."


class StoredFile(FileResponse):
    """A stored image, which may expire between its look-up and its first byte."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        delayed: list[Message] = []
        started = False

        async def send_after_open(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":  # sent before the file is opened
                delayed.append(message)
                return
            started = True
            while delayed:
                await send(delayed.pop())
            await send(message)

        try:
            await super().__call__(scope, receive, send_after_open)
        except (FileNotFoundError, RuntimeError):
            if started:
                raise
            raise NotFoundError(_IMAGE_NOT_FOUND) from None


def create_router(
    settings: Settings,
    generator: ImageGenerator,
    storage: ImageStorage,
    jobs: JobStore,
    idempotent: IdempotentRequests,
    models: Sequence[ServedModel],
) -> APIRouter:
    """All routes of the API."""
    router = APIRouter(redirect_slashes=False)

    def add(endpoint: Endpoint) -> None:
        @router.post(endpoint.path, openapi_extra=endpoint.openapi)
        async def create_images(request: Request) -> Response:
            return await handle_image_request(request, endpoint, settings, generator, storage, idempotent)

    for endpoint in ENDPOINTS:
        add(endpoint)
    add_job_routes(router, settings, generator, jobs, idempotent)
    add_web_pages(router, settings.server.playground)

    @router.get(
        "/v1/models",
        summary="List the served models",
        openapi_extra=openapi.server_route("listModels", ModelList, 200),
    )
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [_model(model.id) for model in models]})

    @router.get(
        "/v1/models/{model:path}",
        summary="Get a model",
        openapi_extra=openapi.server_route("retrieveModel", Model, 200),
    )
    async def get_model(model: str) -> Response:
        # An id may start with a slash, which a proxy or client may drop or double.
        model_id = next((served.id for served in models if served.id.strip("/") == model.strip("/")), None)
        model_id = model_id or next((served.id for served in models if model in served.aliases), None)
        if model_id is None:
            raise NotFoundError(
                f"This server has no model '{model[:100]}'.", param="model", code="model_not_found"
            )
        return json_response(_model(model_id))

    @router.head(FILES_PREFIX + "{name}", include_in_schema=False)
    @router.get(
        FILES_PREFIX + "{name}",
        summary="Get a stored image (no key needed)",
        openapi_extra=openapi.image_file(),
    )
    async def get_file(name: str) -> Response:
        stored = storage.get(name)
        if stored is None:
            raise NotFoundError(_IMAGE_NOT_FOUND)
        return StoredFile(stored.path, media_type=stored.media_type, headers=_FILE_HEADERS)

    @router.get(
        "/health",
        summary="State of the server (no key needed), and with a key its queue and its models",
        openapi_extra=openapi.server_route("health", Health, 200, 503),
    )
    async def health(request: Request) -> Response:
        status = generator.status()
        body = health_body(generator, status, models, settings)
        if not request.state.authenticated:
            body = {"status": body["status"]}
        return json_response(body, 200 if status.state == "ready" else 503)

    @router.api_route(
        "/{path:path}",
        methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY"],
        include_in_schema=False,
    )
    async def not_found(request: Request, path: str) -> Response:
        # Matches every path, so that BentoML's own pages and plain-text errors are not served. Known paths
        # with another method also get here. BentoML's routes are those before the mount of this app.
        outer = takewhile(lambda route: not isinstance(route, Mount), request.scope["router"].routes)
        methods: set[str] = set()
        for route in [*outer, *request.app.router.routes, *router.routes]:
            if route.matches(request.scope)[0] is Match.PARTIAL:
                methods |= getattr(route, "methods", None) or set()
        if methods:
            headers = {"Allow": ", ".join(sorted(methods))}
            raise HTTPException(405, f"{request.method} is not allowed here", headers)
        raise NotFoundError("The path does not exist; /docs lists all paths.")

    return router


def _model(model_id: str) -> dict[str, Any]:
    return {"id": model_id, "object": "model", "created": int(time.time()), "owned_by": "hypergen"}
