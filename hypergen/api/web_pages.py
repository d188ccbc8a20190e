"""The web pages of the server: the playground at `/` and Swagger UI at `/docs`, from files of this package.

The pages are the same on every server of a version, and need no key; what they request from the API does.
"""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

import hypergen
from hypergen.errors import NotFoundError

_PACKAGE = Path(hypergen.__file__).parent
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# A page loads code and data from this server alone, and no other page may embed it.
_CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Cache-Control": "no-cache",  # keep, but ask with the ETag: a new version of the server has new files
    "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}


def add_web_pages(router: APIRouter, playground: bool) -> None:
    """The routes of the pages.

    Args:
        playground: serve it, too; `/docs` is always served.
    """
    _add_page(router, "/docs", _PACKAGE / "api" / "swagger_ui", "/docs/")
    if playground:
        _add_page(router, "/", _PACKAGE / "playground", "/playground/")


def _add_page(router: APIRouter, path: str, folder: Path, prefix: str) -> None:
    """The folder's `index.html` at `path`, and its other files below `prefix`."""
    files = {
        file.relative_to(folder).as_posix(): file
        for file in folder.rglob("*")
        if file.suffix in _MEDIA_TYPES and file.is_file()
    }

    @router.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        return await asyncio.to_thread(_file_response, request, files["index.html"])

    @router.api_route(prefix + "{name:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def page_file(request: Request, name: str) -> Response:
        if name not in files:
            raise NotFoundError("The file does not exist.")
        return await asyncio.to_thread(_file_response, request, files[name])


def _file_response(request: Request, file: Path) -> Response:
    content = file.read_bytes()
    # Of the content, because files of a package may all have the same time.
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": etag}
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=_MEDIA_TYPES[file.suffix])
