"""Errors over HTTP: the table of status codes, and the error body."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from hypergen.errors import (
    AuthenticationError,
    ConflictError,
    DeadlineExceededError,
    ForbiddenError,
    GenerationError,
    InvalidRequestError,
    NotFoundError,
    OutOfMemoryError,
    PayloadTooLargeError,
    QueueFullError,
    RequestError,
    SlowBodyError,
    StorageFullError,
    UnavailableError,
    UnsupportedMediaTypeError,
)

STATUS: dict[type[RequestError], int] = {
    InvalidRequestError: 400,
    AuthenticationError: 401,
    ForbiddenError: 403,
    NotFoundError: 404,
    SlowBodyError: 408,
    ConflictError: 409,
    PayloadTooLargeError: 413,
    UnsupportedMediaTypeError: 415,
    QueueFullError: 429,
    GenerationError: 500,
    OutOfMemoryError: 500,
    UnavailableError: 503,
    DeadlineExceededError: 504,
    StorageFullError: 507,
}

_TYPES = {401: "invalid_request_error", 403: "permission_error", 429: "rate_limit_error"}
_SERVER_TYPES = {503: "service_unavailable_error", 504: "timeout_error"}
_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    413: "payload_too_large",
    415: "unsupported_media_type",
}
# A retry would fail again; without the header the official clients send such a request three times.
_NOT_RETRYABLE = (ConflictError, DeadlineExceededError, StorageFullError, OutOfMemoryError)
# Raised before the whole body is read, so the connection cannot carry another request.
_CLOSING = (AuthenticationError, ForbiddenError, PayloadTooLargeError, SlowBodyError)
CLIENT_CLOSED_REQUEST = 499  # nginx's status, only for the log


class ClientDisconnectedError(Exception):
    """The client disconnected before its response."""


def status_of(error: RequestError) -> int:
    """The status code of an error's class, or of its nearest base class in the table."""
    return next((STATUS[base] for base in type(error).__mro__ if base in STATUS), 500)


def envelope(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The error body: `error` as in OpenAI's and Hyperbolic's APIs, `detail` as in the HyperGen documents."""
    if status < 500:
        error_type = _TYPES.get(status, "invalid_request_error")
    else:
        error_type = _SERVER_TYPES.get(status, "internal_error")
    code = code or _CODES.get(status, "invalid_request" if status < 500 else "internal_error")
    return {
        "error": {"message": message, "type": error_type, "param": param, "code": code},
        "detail": message,
    }


def error_body(error: RequestError) -> dict[str, Any]:
    """The body for an error."""
    return envelope(status_of(error), error.message, error.param, error.code)


def to_response(error: RequestError) -> Response:
    """The response for an error."""
    body = error_body(error)
    headers: dict[str, str] = {}
    if isinstance(error, AuthenticationError):
        # LiteLLM matches OpenAI's text in `error.message`; the HyperGen documents specify `detail`.
        body["error"]["message"] = "Incorrect API key provided. Send it as 'Authorization: Bearer KEY'."
        body["detail"] = "Invalid API key"
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, _NOT_RETRYABLE) or error.code == "poison":
        headers["x-should-retry"] = "false"
    if isinstance(error, _CLOSING):
        headers["Connection"] = "close"
    return json_response(body, status_of(error), headers)


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(body), status, headers, media_type="application/json")


def to_json(body: Any) -> bytes:
    """JSON in ASCII, because a prompt may contain lone surrogates, which UTF-8 cannot encode."""
    return json.dumps(body, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")
