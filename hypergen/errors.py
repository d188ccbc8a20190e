"""The one tree of errors. It knows nothing of HTTP: `hypergen/api/errors.py` holds the table of status codes.

    HyperGenError
    ├── ConfigurationError          a setting is wrong; the server does not start
    ├── ModelError                  a model is missing, damaged or of a kind that is not served
    └── RequestError                sent to the client, with the parameter that caused it
        ├── InvalidRequestError
        ├── AuthenticationError
        ├── ForbiddenError
        ├── NotFoundError
        ├── PayloadTooLargeError
        ├── SlowBodyError
        ├── UnsupportedMediaTypeError
        ├── QueueFullError          come back in `retry_after_s`
        ├── UnavailableError        loading, recovering or draining: come back in `retry_after_s`
        ├── DeadlineExceededError
        ├── StorageFullError
        └── GenerationError
            └── OutOfMemoryError

Request errors cross the border between the engine process and the HTTP process as a plain tuple (`pack`,
`unpack`), so that neither side ever unpickles an exception of a library.
"""

from __future__ import annotations


class HyperGenError(Exception):
    """Base of everything that HyperGen raises on purpose."""


class ConfigurationError(HyperGenError):
    """A setting, flag or configuration file is wrong."""


class ModelError(HyperGenError):
    """A model cannot be found, read or served. The message is one line and names what is wrong."""


class RequestError(HyperGenError):
    """A request that ends without images.

    Args:
        message: for the client; no paths, no traces.
        param: the field of the request that caused it, in the words of the client's dialect.
        code: machine-readable reason.
        retry_after_s: whole seconds after which trying again makes sense.
    """

    code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.retry_after_s = retry_after_s


class InvalidRequestError(RequestError):
    """A field is missing, malformed or out of range."""

    code = "invalid_value"


class AuthenticationError(RequestError):
    """The bearer key is missing or wrong."""

    code = "invalid_api_key"


class ForbiddenError(RequestError):
    """The server takes no requests of this origin or under this name."""

    code = "forbidden"


class NotFoundError(RequestError):
    """No such route, model or stored image."""

    code = "not_found"


class PayloadTooLargeError(RequestError):
    """The body is larger than the server reads."""

    code = "payload_too_large"


class SlowBodyError(RequestError):
    """The body did not come in time."""

    code = "request_timeout"


class UnsupportedMediaTypeError(RequestError):
    """The body is of a kind that the route does not read."""

    code = "unsupported_media_type"


class QueueFullError(RequestError):
    """Neither the queue nor the overflow queue has room, or the wait in the overflow queue timed out."""

    code = "rate_limit_exceeded"


class UnavailableError(RequestError):
    """The engine is loading, recovering or draining."""

    code = "loading"


class DeadlineExceededError(RequestError):
    """The request did not finish within its time."""

    code = "timeout"


class StorageFullError(RequestError):
    """An image could not be stored for its `url`; `b64_json` needs no storage."""

    code = "storage_full"


class GenerationError(RequestError):
    """Generation failed for a reason in the server."""

    code = "internal_error"


class OutOfMemoryError(GenerationError):
    """The image does not fit into the accelerator's memory even alone."""

    code = "out_of_memory"


PackedError = tuple[str, str, str | None, str, int | None]


def pack(error: RequestError) -> PackedError:
    """Turn an error into plain values: class name, message, param, code, retry_after_s."""
    return (type(error).__name__, error.message, error.param, error.code, error.retry_after_s)


def unpack(packed: PackedError) -> RequestError:
    """Rebuild what `pack` took apart; a class of another version becomes a GenerationError."""
    name, message, param, code, retry_after_s = packed
    kind = globals().get(name)
    if not (isinstance(kind, type) and issubclass(kind, RequestError)):
        kind = GenerationError
    return kind(message, param=param, code=code, retry_after_s=retry_after_s)
