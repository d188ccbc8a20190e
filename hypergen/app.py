"""The one place where the HTTP half meets the pool of engines."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import psutil
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from hypergen import __version__
from hypergen.api.errors import envelope, json_response, to_response
from hypergen.api.routes import ClientGoneError, create_router
from hypergen.config import Settings
from hypergen.engine.pool import EnginePool
from hypergen.errors import RequestError
from hypergen.images.storage import ImageStorage


def create_app(settings: Settings, pool: EnginePool, model_id: str) -> FastAPI:
    """The API over a pool. Starts nothing: the parent process, a build and the worker all call it."""
    storage = ImageStorage(settings.server.url_lifetime_s, int(settings.server.url_storage_mb * 1e6))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        # BentoML lets only warnings of other loggers through; the access log is one of ours.
        logging.getLogger("hypergen").setLevel(logging.INFO)
        yield
        storage.close()

    app = FastAPI(
        title="HyperGen", version=__version__, redirect_slashes=False, redoc_url=None, lifespan=lifespan
    )
    app.include_router(create_router(settings, pool, storage, model_id))

    @app.exception_handler(RequestError)
    async def request_error(_: Request, error: RequestError) -> Response:
        return to_response(error)

    @app.exception_handler(ClientGoneError)
    async def client_gone(_: Request, __: ClientGoneError) -> Response:
        return Response(status_code=499)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, __: RequestValidationError) -> Response:
        return json_response(envelope(400, "The request is invalid."), 400)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return json_response(
            envelope(error.status_code, f"{error.detail}."), error.status_code, dict(error.headers or {})
        )

    return app


async def leave_with_parent(launcher: int | None) -> None:
    """End this process when those that started it are gone, so that killing them leaves no orphan on the
    port.

    Args:
        launcher: process id of the `hypergen serve` that stands above BentoML's main process, if there is
            one.
    """
    parent = os.getppid()
    while os.getppid() == parent:
        if launcher is not None and not psutil.pid_exists(launcher):
            os.kill(parent, signal.SIGTERM)
            return
        await asyncio.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
