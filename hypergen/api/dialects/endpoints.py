"""The table of dialects: every way to ask for pictures, by its path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import BaseModel

from hypergen.api import openapi
from hypergen.api.dialects import hyperbolic, openai_edits, openai_images, openai_stream
from hypergen.api.validation import Asked
from hypergen.config import ServerSettings
from hypergen.events import ImageFinished, Preview
from hypergen.model_info import ModelDescription


@dataclass(frozen=True, kw_only=True)
class Operation:
    """How a body becomes a request, and pictures an answer.

    Args:
        form: the fields whose types a multipart form is read by; absent: only JSON is read.
        described: the operation in /openapi.json.
        model_field: names the model.
        to_frame: asked, the time and an event of a stream; gives it in pieces. Absent: there are no streams.
        to_response: asked, images, their addresses if they have any, and the time; gives JSON in pieces.
    """

    path: str
    to_request: Callable[[dict[str, Any], ModelDescription, ServerSettings, str], Asked]
    to_response: Callable[[Any, list[ImageFinished], list[str] | None, int], list[bytes]]
    form: type[BaseModel] | None = None
    model_field: str = "model"
    described: dict[str, Any]
    to_frame: Callable[[Any, int, Preview | ImageFinished], list[bytes]] | None = None


GENERATIONS = Operation(
    path="/v1/images/generations",
    to_request=openai_images.to_request,
    to_response=openai_images.to_response,
    to_frame=partial(openai_stream.to_frame, "image_generation"),
    described=openapi.generations(),
)
EDITS = Operation(
    path="/v1/images/edits",
    described=openapi.edits(),
    to_request=openai_edits.to_edit,
    to_response=openai_images.to_response,
    to_frame=partial(openai_stream.to_frame, "image_edit"),
    form=openai_edits.EditBody,
)
VARIATIONS = Operation(
    path="/v1/images/variations",
    described=openapi.variations(),
    to_request=openai_edits.to_variation,
    to_response=openai_images.to_response,
    to_frame=partial(openai_stream.to_frame, "image_edit"),
    form=openai_edits.EditBody,
)
HYPERBOLIC = Operation(
    path="/v1/image/generation",
    model_field="model_name",
    to_request=hyperbolic.to_request,
    to_response=hyperbolic.to_response,
    described=openapi.hyperbolic_generation(),
)

OPERATIONS = (GENERATIONS, EDITS, VARIATIONS, HYPERBOLIC)
