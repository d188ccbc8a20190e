"""`Endpoint`: the declaration of a route that generates images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from hypergen.api.progress_report import ProgressReport
from hypergen.api.validated_request import ValidatedRequest
from hypergen.config import ServerSettings
from hypergen.events import ImageFinished, Preview
from hypergen.model_info import ModelInfo


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A route: translates a body to a `ValidatedRequest`, and images to a response.

    Args:
        model_field: the field that names the model.
        image_fields: the fields with input images. A body with one of them may be large; it is parsed in a
            thread.
        claims: whether the body of a job is for this route: (body, is a form) -> bool.
        body: the model of the body.
        accepts_forms: whether the body may be a multipart form, whose types are those of `body`.
        to_request: (body, model info, settings, request id) -> `ValidatedRequest`; raises
            `InvalidRequestError`.
        validated: the class of what `to_request` returns, from which a stored job is read.
        to_response: (validated, images, their URLs if any, Unix time) -> pieces of JSON.
        to_sse_event: (validated, Unix time, event) -> pieces of a server-sent event; None: no streaming.
        openapi: the operation in /openapi.json.
        schemas: the named schemas that the operation refers to.
    """

    path: str
    model_field: str
    image_fields: frozenset[str]
    claims: Callable[[dict[str, Any], bool], bool]
    body: type[BaseModel]
    accepts_forms: bool = False
    to_request: Callable[[dict[str, Any], ModelInfo, ServerSettings, str], ValidatedRequest]
    validated: type[ValidatedRequest] = ValidatedRequest
    to_response: Callable[[Any, list[ImageFinished], list[str] | None, int], list[bytes]]
    to_sse_event: Callable[[Any, int, Preview | ImageFinished | ProgressReport], list[bytes]] | None = None
    openapi: dict[str, Any]
    schemas: tuple[type[BaseModel], ...]

    def unknown_fields(self, body: Iterable[str]) -> list[str]:
        """The fields of a body that this route ignores, sorted."""
        return sorted(set(body) - self.body.model_fields.keys())
