"""The result of validation: `ValidatedRequest`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self
from urllib.parse import quote

from hypergen.errors import InvalidRequestError, RequestError
from hypergen.request import ApiKey, GenerationRequest

# Ignored fields in a response header.
_MAX_NAMES, _MAX_NAME = 20, 40


def to_header(text: str) -> str:
    """The value of a header, percent-encoded where a header cannot have it."""
    return quote(text, safe="/:@ ()[]+=!~*'")


@dataclass(frozen=True)
class ValidatedRequest:
    """A validated request: what to generate, and how to build the response."""

    generation: GenerationRequest
    response_format: Literal["url", "b64_json"] | None = None
    headers: dict[str, str] = field(default_factory=dict[str, str])
    stream: bool = False
    stream_progress: bool = False
    # Field of `GenerationRequest` -> the dialect's name for it, for errors of the engine.
    client_fields: dict[str, str] = field(default_factory=dict[str, str])
    ignored_fields: tuple[str, ...] = ()  # as in a header
    understood_prompt: str | None = None  # what the model understood of a prompt without a word that it knows

    def reject_stream(self) -> None:
        """For routes without streaming."""
        if self.stream:
            raise InvalidRequestError("'stream' is not supported by this route.", param="stream")

    @property
    def response_headers(self) -> dict[str, str]:
        """The model that answers, the fields that had no effect, and the headers of the dialect."""
        headers = {"x-hypergen-model": to_header(self.generation.model or "")}
        if self.ignored_fields:
            headers["x-hypergen-ignored"] = ", ".join(self.ignored_fields)
        return headers | self.headers

    def of_request(self, api_key: ApiKey, unknown_fields: Sequence[str]) -> Self:
        """With the key that the request was sent with, and the fields of its body that are not ours."""
        ignored = tuple(to_header(name[:_MAX_NAME]) for name in unknown_fields[:_MAX_NAMES])
        return replace(self, generation=replace(self.generation, api_key=api_key), ignored_fields=ignored)

    def without_input_images(self) -> Self:
        """Without input images, which may be large and are not needed for the response."""
        return replace(self, generation=self.generation.without_input_images())

    def with_client_field_names(self, error: RequestError) -> RequestError:
        """An error of the engine, with the dialect's field name in `param` and in the message."""
        error.param = self.client_fields.get(error.param or "", error.param)
        if error.param is not None and f"'{error.param}'" not in error.message:
            error.message = f"'{error.param}': {error.message}"
        return error
