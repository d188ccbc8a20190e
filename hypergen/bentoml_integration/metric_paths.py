"""Endpoint names for metrics: a fixed set, so that no client adds series by requesting other paths.

BentoML counts requests by their raw path, even if the path or the key is unknown.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from hypergen.api.auth import FILES_PREFIX
from hypergen.api.dialects.endpoints import ENDPOINTS

OTHER = "other"
_FIXED = frozenset(
    {
        "/",
        "/generate",
        "/metrics",
        "/livez",
        "/healthz",
        "/readyz",
        "/health",
        "/docs",
        "/openapi.json",
        "/v1/models",
        "/v1/images/jobs",
        *(endpoint.path for endpoint in ENDPOINTS),
    }
)
_WITH_NAMES = {
    "/v1/models/": "/v1/models/{model}",
    "/v1/images/jobs/": "/v1/images/jobs/{job_id}",
    FILES_PREFIX: FILES_PREFIX + "{name}",
    "/playground/": "/playground/{name}",
    "/docs/": "/docs/{name}",
}
_TRUE_PATH = "hypergen.path"


def endpoint_name(path: str) -> str:
    """The metric label for requests to this path."""
    named = (name for prefix, name in _WITH_NAMES.items() if path.startswith(prefix))
    return path if path in _FIXED else next(named, OTHER)


class NamedEndpoints:
    """ASGI middleware around the metrics middleware: replaces the path by the endpoint's name."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": endpoint_name(scope["path"]), _TRUE_PATH: scope["path"]}
        await self._app(scope, receive, send)


class TruePaths:
    """ASGI middleware inside the metrics middleware: restores the path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _TRUE_PATH in scope:
            scope["path"] = scope.pop(_TRUE_PATH)
        await self._app(scope, receive, send)
