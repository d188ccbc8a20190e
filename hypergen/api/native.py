"""The items of BentoML's own batchable API: the fields of an OpenAI request in, one result each out."""

from __future__ import annotations

import asyncio
import base64
import logging
import uuid
from typing import Any

from pydantic import BaseModel, Field

from hypergen.api.dialects import openai
from hypergen.api.errors import envelope, status_of
from hypergen.api.routes import loaded
from hypergen.config import Settings
from hypergen.errors import DeadlineExceededError, GenerationError, RequestError
from hypergen.generation import ImageGenerator, draw_all

logger = logging.getLogger(__name__)


class NativeImage(BaseModel):
    """One picture."""

    b64_json: str = Field(description="the file, base64")
    seed: int = Field(description="the seed that draws this picture alone")


class NativeResult(BaseModel):
    """What became of one item: pictures, or the status and error that the OpenAI route would answer."""

    status: int = 200
    images: list[NativeImage] = []
    error: dict[str, Any] | None = None


async def draw_item(generator: ImageGenerator, settings: Settings, item: dict[str, Any]) -> NativeResult:
    """Draw one item of a batch; it fails alone, because an exception would fail its batch-mates too."""
    try:
        description = loaded(generator)
        body = {name: value for name, value in item.items() if value is not None}
        asked = openai.to_request(body, description, settings.server, f"item_{uuid.uuid4().hex}")
        async with asyncio.timeout(settings.queue.request_timeout_s):
            images = await draw_all(generator, asked.generation)
    except TimeoutError:
        return _failed(DeadlineExceededError(f"Not finished within {settings.queue.request_timeout_s:g} s."))
    except Exception as error:  # the edge of the HTTP half, for one item
        if not isinstance(error, RequestError):
            logger.exception("An item of the native API failed.")
            error = GenerationError("The server failed on this item; its log says why.")
        return _failed(error)
    return NativeResult(
        images=[
            NativeImage(b64_json=base64.b64encode(image.data).decode("ascii"), seed=image.seed)
            for image in images
        ]
    )


def _failed(error: RequestError) -> NativeResult:
    status = status_of(error)
    return NativeResult(
        status=status, error=envelope(status, error.message, error.param, error.code)["error"]
    )
