"""The `url` results of responses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache, partial

from starlette.requests import Request

from hypergen.api.auth import FILES_PREFIX
from hypergen.api.hosts import is_named_host
from hypergen.api.validated_request import ValidatedRequest
from hypergen.config import Settings
from hypergen.errors import InvalidRequestError, UnavailableError
from hypergen.events import ImageFinished
from hypergen.images.encoding import OUTPUT_FORMATS
from hypergen.images.storage import ImageStorage
from hypergen.request import GenerationRequest

logger = logging.getLogger(__name__)

# Between attempts to store an image of a job, whose client does not wait for a response.
_RETRY_DELAYS_S = (1, 2, 4, 8, 15)


@contextmanager
def suggest_base64() -> Generator[None]:
    """Let an error of a storage that cannot be reached name the parameter by which a request needs none."""
    try:
        yield
    except UnavailableError as error:
        error.param = "response_format"
        error.message += " With 'response_format' b64_json it is not needed."
        raise


async def store_images(
    storage: ImageStorage, request: GenerationRequest, images: list[ImageFinished]
) -> list[str]:
    """Store the image files; returns their names.

    Raises:
        StorageFullError, UnavailableError: see `ImageStorage.put`.
    """
    file_format = OUTPUT_FORMATS[request.output_format]
    return await asyncio.gather(
        *(storage.put(image.data, file_format.extension, file_format.media_type) for image in images)
    )


async def urls_of(storage: ImageStorage, names: list[str], base: str) -> list[str]:
    """The URLs of stored images.

    Args:
        base: of `url_base`.

    Raises:
        UnavailableError: see `ImageStorage.url`.
    """
    return [await storage.url(name, base) for name in names]


async def store_image_of_job(storage: ImageStorage, request: GenerationRequest, image: ImageFinished) -> str:
    """Store an image file of a job; returns its name. Waits half a minute for a storage that is away.

    Raises:
        StorageFullError, UnavailableError: see `ImageStorage.put`.
    """
    file_format = OUTPUT_FORMATS[request.output_format]
    put = partial(storage.put, image.data, file_format.extension, file_format.media_type)
    for delay_s in _RETRY_DELAYS_S:
        with suppress(UnavailableError):
            return await put()
        await asyncio.sleep(delay_s)
    return await put()


def url_base(request: Request, settings: Settings, validated: ValidatedRequest) -> str | None:
    """The URL before a stored image's name: the public URL, else scheme, host and port of the request.
    Empty for object storage, whose URLs are whole.

    None if the response has no `url`: only base64 was requested, or the operator did not name the host of the
    request. A client that forges the Host header could otherwise put its own address into responses.

    Raises:
        InvalidRequestError: only a `url` was requested, and the operator did not name the host.
    """
    if validated.response_format == "b64_json":
        return None
    if settings.server.storage:
        return ""
    if settings.server.public_url:
        return settings.server.public_url.rstrip("/") + FILES_PREFIX
    host = request.headers.get("host", "")
    local_address, _ = request.scope.get("server") or (None, None)
    if is_named_host(host, settings.server, local_address):
        return f"{request.scope['scheme']}://{host}{settings.server.root_path}{FILES_PREFIX}"
    _warn_unknown_host()
    if validated.response_format == "url":
        raise InvalidRequestError(
            "'response_format' url is not possible: the Host of this request is not allowed by --public-url "
            "or --allowed-host. Use 'b64_json'.",
            param="response_format",
            code="invalid_host",
        )
    return None


@cache
def _warn_unknown_host() -> None:
    logger.warning(
        "Responses have no url: the Host of requests is not allowed by --public-url or --allowed-host."
    )
