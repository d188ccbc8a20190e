"""The FastAPI app, which connects the API with the engine pool."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from hypergen import __version__, optional_packages
from hypergen.api import openapi
from hypergen.api.dialects.endpoints import ENDPOINTS
from hypergen.api.errors import (
    CLIENT_CLOSED_REQUEST,
    ClientDisconnectedError,
    envelope,
    json_response,
    to_response,
)
from hypergen.api.idempotency import IdempotentRequests, SharedAnswers, StoredAnswers
from hypergen.api.job_store import JobStore
from hypergen.api.jobs import MemoryJobs
from hypergen.api.routes import create_router
from hypergen.config import ServerSettings, Settings
from hypergen.engine_client.pool import EnginePool
from hypergen.errors import RequestError
from hypergen.images.storage import ImageStorage, open_storage
from hypergen.images.temporary_folders import remove_folders_of_killed_servers
from hypergen.served_model import ServedModel

logger = logging.getLogger(__name__)

_CLEANUP_INTERVAL_S = 10.0


def create_app(settings: Settings, pool: EnginePool, models: Sequence[ServedModel]) -> FastAPI:
    """The API over the pool that serves these models.

    It starts nothing, because the parent process, a build and the worker all call it.

    Raises:
        SettingError: the storage needs a package that is not installed.
    """
    storage = open_storage(settings.server)
    jobs, shared_answers = _create_stores(settings, pool, storage)
    answers = StoredAnswers(settings.server.url_lifetime_s, int(settings.server.idempotency_mb * 1e6))
    idempotent = IdempotentRequests(answers, shared_answers)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        await asyncio.to_thread(remove_folders_of_killed_servers)
        # Each garbage collection of these permanent objects would block the loop for tens of ms.
        gc.collect()
        gc.freeze()
        # Every callback runs, even if another one raises.
        async with AsyncExitStack() as closing:
            closing.callback(storage.close)
            await jobs.start()
            closing.push_async_callback(jobs.close)
            closing.callback(asyncio.create_task(_remove_expired_images(storage)).cancel)
            yield

    app = FastAPI(
        title="HyperGen",
        version=__version__,
        redirect_slashes=False,
        docs_url=None,  # api/web_pages.py: FastAPI's page loads its files from another host
        redoc_url=None,
        lifespan=lifespan,
        servers=[{"url": settings.server.root_path}] if settings.server.root_path else None,
    )
    fastapi_openapi = app.openapi
    schemas = [schema for endpoint in ENDPOINTS for schema in endpoint.schemas]
    app.openapi = lambda: openapi.complete(fastapi_openapi(), schemas)
    app.include_router(create_router(settings, pool, storage, jobs, idempotent, models))

    @app.exception_handler(RequestError)
    async def request_error(_: Request, error: RequestError) -> Response:
        return to_response(error)

    @app.exception_handler(ClientDisconnectedError)
    async def client_disconnected(_: Request, __: ClientDisconnectedError) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, __: RequestValidationError) -> Response:
        return json_response(envelope(400, "The request is invalid."), 400)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return json_response(
            envelope(error.status_code, f"{error.detail}."), error.status_code, dict(error.headers or {})
        )

    return app


def check_shared_store(server: ServerSettings) -> None:
    """Connect to Redis once, before the server starts; nothing if jobs are in memory.

    Raises:
        SettingError: it cannot be used, or its package is missing.
    """
    if server.jobs is not None:
        optional_packages.require("redis", "jobs")
        from hypergen.api.redis_jobs.connection import check_redis

        check_redis(server.jobs)


def _create_stores(
    settings: Settings, pool: EnginePool, storage: ImageStorage
) -> tuple[JobStore, SharedAnswers | None]:
    """The store of jobs, and the one of answers that servers share; it connects to nothing."""
    server = settings.server
    if server.jobs is None:
        return MemoryJobs(pool, storage, server.url_lifetime_s, server.max_jobs), None
    optional_packages.require("redis", "jobs")
    from hypergen.api.redis_jobs.connection import connect
    from hypergen.api.redis_jobs.redis_answers import RedisAnswers
    from hypergen.api.redis_jobs.redis_jobs import RedisJobs

    redis = connect(server.jobs)
    answers = RedisAnswers(redis, server.url_lifetime_s, int(server.idempotency_mb * 1e6))
    return RedisJobs(redis, settings, pool, storage), answers


async def _remove_expired_images(storage: ImageStorage) -> None:
    while True:
        await asyncio.sleep(_CLEANUP_INTERVAL_S)
        try:
            await asyncio.to_thread(storage.remove_expired)
        except Exception:  # Isolate the failure: nothing awaits this task.
            logger.exception("Expired images could not be removed.")
