"""What a dialect declares: one `Endpoint` for each route that generates images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from hypergen.api.validation import ValidatedRequest
from hypergen.config import ServerSettings
from hypergen.events import ImageFinished, Preview
from hypergen.model_info import ModelInfo


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """How a body becomes a request, and images an answer.

    Args:
        model_field: names the model.
        image_fields: hold input images. A body with one of them may be large, and is read in a thread.
        claims: whether a body that was sent as a job, as a form or not, is of this route.
        form: the fields whose types a multipart form is read by; absent: only JSON is read.
        to_response: asked, images, their addresses if they have any, and the time; gives JSON in pieces.
        to_sse_event: asked, the time and an event of a stream; gives it in pieces. Absent: no streams.
        openapi: the operation in /openapi.json.
        schemas: the named schemas that it refers to.
    """

    path: str
    model_field: str
    image_fields: frozenset[str]
    claims: Callable[[dict[str, Any], bool], bool]
    form: type[BaseModel] | None = None
    to_request: Callable[[dict[str, Any], ModelInfo, ServerSettings, str], ValidatedRequest]
    to_response: Callable[[Any, list[ImageFinished], list[str] | None, int], list[bytes]]
    to_sse_event: Callable[[Any, int, Preview | ImageFinished], list[bytes]] | None = None
    openapi: dict[str, Any]
    schemas: tuple[type[BaseModel], ...]
