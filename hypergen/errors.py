"""The exception hierarchy. It is independent of HTTP; `hypergen/api/errors.py` maps it to status codes.

    HyperGenError
    ├── ConfigurationError          a setting is invalid; the server does not start
    │   └── SettingError            one that does not fit the model, the device or this machine
    ├── ModelError                  a model is missing, damaged or not supported
    └── RequestError                sent to the client, with the parameter that caused it
        ├── InvalidRequestError
        │   └── ContentPolicyError  the content filter refused the image
        ├── AuthenticationError
        ├── ForbiddenError
        ├── NotFoundError
        ├── ConflictError
        ├── PayloadTooLargeError
        ├── SlowBodyError
        ├── UnsupportedMediaTypeError
        ├── QueueFullError          retry after `retry_after_s`
        ├── UnavailableError        loading, draining, no object storage; retry after `retry_after_s`
        ├── DeadlineExceededError
        ├── StorageFullError
        └── GenerationError
            └── OutOfMemoryError

Between the engine process and the HTTP process, a request error is a plain tuple (`pack`, `unpack`), so that
neither side unpickles exceptions of libraries.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


class HyperGenError(Exception):
    """Base of everything that HyperGen raises on purpose."""


class ConfigurationError(HyperGenError):
    """A setting, flag or configuration file is invalid."""


class SettingError(ConfigurationError):
    """A setting does not fit the model, the device or this machine.

    Raised where the value is used, which does not know who gave it. `SettingNames` puts the name before the
    reason as the user wrote it: a flag, a variable, or the line of a file.

    Args:
        setting: name of the field in the settings, such as `refiner`.
        reason: the rest of the sentence, one line; it may begin with the value, or with a colon.
        item: of a setting with named values, such as `controlnet`: the name of the one.

    Attributes:
        model: index of the model that it was given for, or with; None: for all.
    """

    def __init__(self, setting: str, reason: str, *, item: str | None = None) -> None:
        self.setting = setting
        self.reason = reason
        self.item = item
        self.model: int | None = None
        super().__init__(self.named(setting))

    def named(self, name: str) -> str:
        """The message with the setting's name as its user wrote it."""
        return f"{name}{self.reason}" if self.reason.startswith(":") else f"{name} {self.reason}"


@contextmanager
def of_model(index: int) -> Generator[None]:
    """Say of the settings that do not fit which model they are of, by its index."""
    try:
        yield
    except SettingError as error:
        error.model = index
        raise


@contextmanager
def of_setting(setting: str, value: object = "", *, item: str | None = None) -> Generator[None]:
    """Say of a `ModelError` which setting it is about.

    Raises:
        SettingError: instead of the error.
    """
    try:
        yield
    except ModelError as error:
        raise SettingError(setting, f"{value}: {error}", item=item) from None


class ModelError(HyperGenError):
    """A model cannot be found, read or served. The message is one line and says why."""


class RequestError(HyperGenError):
    """A request that ends without images.

    Args:
        message: for the client, without paths and tracebacks.
        param: the request field that caused it, as named in the client's dialect.
        code: machine-readable reason.
        retry_after_s: whole seconds after which a retry makes sense.
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


class ContentPolicyError(InvalidRequestError):
    """The content filter refused the image."""

    code = "content_policy_violation"


class AuthenticationError(RequestError):
    """The bearer key is missing or wrong."""

    code = "invalid_api_key"


class ForbiddenError(RequestError):
    """The server refuses requests of this origin or for this host name."""

    code = "forbidden"


class NotFoundError(RequestError):
    """No such route, model or stored image."""

    code = "not_found"


class ConflictError(RequestError):
    """An idempotency key was used before, for another request."""

    code = "idempotency_key_reused"


class PayloadTooLargeError(RequestError):
    """The body is larger than the limit."""

    code = "payload_too_large"


class SlowBodyError(RequestError):
    """The body did not arrive in time."""

    code = "request_timeout"


class UnsupportedMediaTypeError(RequestError):
    """The route does not support this media type of the body."""

    code = "unsupported_media_type"


class QueueFullError(RequestError):
    """Neither the queue nor the overflow queue has room, or the wait in the overflow queue timed out."""

    code = "rate_limit_exceeded"


class UnavailableError(RequestError):
    """The engine is loading, recovering or draining, or the object storage cannot be reached."""

    code = "loading"


class DeadlineExceededError(RequestError):
    """The request did not finish within its time."""

    code = "timeout"


class StorageFullError(RequestError):
    """An image could not be stored for its `url`; `b64_json` needs no storage."""

    code = "storage_full"


class GenerationError(RequestError):
    """Generation failed because of the server, not because of the request."""

    code = "internal_error"


class OutOfMemoryError(GenerationError):
    """The image does not fit into the accelerator's memory, even in a batch of one."""

    code = "out_of_memory"


PackedError = tuple[str, str, str | None, str, int | None]


def pack(error: RequestError) -> PackedError:
    """Turn an error into plain values: class name, message, param, code, retry_after_s."""
    return (type(error).__name__, error.message, error.param, error.code, error.retry_after_s)


def unpack(packed: PackedError) -> RequestError:
    """The error from `pack`; an unknown class name becomes a GenerationError."""
    name, message, param, code, retry_after_s = packed
    error_class = globals().get(name)
    if not (isinstance(error_class, type) and issubclass(error_class, RequestError)):
        error_class = GenerationError
    return error_class(message, param=param, code=code, retry_after_s=retry_after_s)
