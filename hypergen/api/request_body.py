"""Reading of request bodies: limits on size, time and memory, and strict JSON."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterable
from typing import Any, cast

from starlette.requests import Request
from starlette.types import Message, Receive, Scope

from hypergen.errors import (
    InvalidRequestError,
    PayloadTooLargeError,
    QueueFullError,
    RequestError,
    SlowBodyError,
    UnsupportedMediaTypeError,
)

# Timeout of a body: the stall time plus the time for its bytes at the minimum rate.
_STALL_TIMEOUT_S = 30.0
_MIN_BYTES_PER_S = 10_000
# The default of the setting.
MAX_TEXT_BYTES = 1_000_000
_MAX_TOKENS = 100_000
_CHARSET = re.compile(r";\s{0,9}charset=\"?([\w.:+-]{1,40})", re.ASCII | re.IGNORECASE)
_UTF_8 = ("utf-8", "utf8", "utf-8-sig", "us-ascii", "ascii")
MAX_ITEMS = 64  # per call of the batchable API, because items are validated on the event loop


class BodyMemory:
    """Memory limit for all bodies that are being received or wait to be parsed."""

    # Not counted per body, so that input images of other requests do not block requests without them.
    FREE_BYTES = 64 * 1024

    def __init__(self, max_bytes: float) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0


class BodyLimit:
    """Limits of one request's body: size, transfer rate, and the memory of all bodies.

    The size is checked by the Content-Length header first, and then as the bytes arrive.

    Attributes:
        error: the exceeded limit.
    """

    def __init__(self, scope: Scope, receive: Receive, max_bytes: int, memory: BodyMemory) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._memory = memory
        self._held_bytes = 0
        self._received_bytes = 0
        self._complete = False
        self._started_at = time.monotonic()
        exceeds_limit = any(
            name == b"content-length" and value.isdigit() and int(value[:20]) > max_bytes
            for name, value in scope["headers"]
        )
        self.error: RequestError | None = self._too_large() if exceeds_limit else None

    async def receive(self) -> Message:
        if self._complete:  # the caller waits for the client to disconnect
            return await self._receive()
        deadline = self._started_at + _STALL_TIMEOUT_S + self._received_bytes / _MIN_BYTES_PER_S
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            self.error = SlowBodyError("Timed out while reading the request body.")
            raise self.error from None
        self._complete = not message.get("more_body")
        self._received_bytes += len(message.get("body", b""))
        if self._received_bytes > self._max_bytes:
            self.error = self._too_large()
            raise self.error
        self._hold(max(0, self._received_bytes - BodyMemory.FREE_BYTES))
        return message

    def release(self) -> None:
        """Call when the body is parsed (its images are counted elsewhere), or when the request ends."""
        self._hold(0)

    def _hold(self, size: int) -> None:
        self._memory.held_bytes += size - self._held_bytes
        self._held_bytes = size
        limit = max(self._memory.max_bytes, size)  # a single body is always accepted
        if size and self._memory.held_bytes > limit:
            self.release()
            self.error = QueueFullError(
                "The server is reading too many large requests. Try again in 5 s.", retry_after_s=5
            )
            raise self.error

    def _too_large(self) -> PayloadTooLargeError:
        return PayloadTooLargeError(
            f"The body is larger than this server's limit of {self._max_bytes:,} bytes."
        )


class JsonBounds:
    """Limits of a JSON body, checked as the bytes arrive, before anything is parsed.

    Parsing holds the GIL and blocks the event loop: 10 s for 24 MB of empty lists.

    Args:
        max_text_bytes: limit for a body that names no image field.
        image_fields: names of fields with input images.
    """

    def __init__(self, max_text_bytes: int, image_fields: Iterable[str] = ()) -> None:
        self._max_text_bytes = max_text_bytes
        self._names = [f'"{name}"'.encode() for name in image_fields]
        self._max_name_bytes = max(map(len, self._names), default=1)
        self._received_bytes = 0
        self._tokens = 0
        self._has_image = False
        self._end = b""  # of the previous bytes, because a name may be split between two chunks

    def feed(self, chunk: bytes) -> None:
        """Check the next bytes.

        Raises:
            PayloadTooLargeError: the body is too large for one without input images.
            InvalidRequestError: it has too many JSON tokens.
        """
        self._received_bytes += len(chunk)
        # Also inside strings; base64 contains none of them.
        self._tokens += sum(map(chunk.count, (b"[", b"{", b",", b":")))
        if self._tokens > _MAX_TOKENS:
            raise InvalidRequestError(
                f"The body has more than {_MAX_TOKENS:,} JSON tokens.", code="invalid_json"
            )
        if self._has_image:
            return
        seen = self._end + chunk
        self._has_image = any(name in seen for name in self._names)
        self._end = seen[-self._max_name_bytes :]
        if self._received_bytes > self._max_text_bytes and not self._has_image:
            raise text_too_large(self._max_text_bytes)


def text_too_large(max_text_bytes: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"Bodies without input images may have at most {max_text_bytes:,} bytes.")


async def read_json_object(
    request: Request,
    accepts_form: bool = False,
    max_text_bytes: int = MAX_TEXT_BYTES,
    image_fields: Iterable[str] = (),
) -> dict[str, Any]:
    """The body as a JSON object, without fields that are null.

    Args:
        accepts_form: the route also accepts forms; only for the error message.
        max_text_bytes: limit for a body without input images.
        image_fields: names of fields with input images.

    Raises:
        UnsupportedMediaTypeError: the media type is not JSON, or the body is compressed.
        PayloadTooLargeError: the body is too large for one without input images.
        InvalidRequestError: it is not a JSON object in UTF-8, has duplicate keys, NaN or Infinity, or has too
            many tokens.
    """
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json":
        form = " or as a form, with 'multipart/form-data'" if accepts_form else ""
        raise UnsupportedMediaTypeError(
            f"Send the request as JSON, with 'Content-Type: application/json'{form}."
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaTypeError("Compressed request bodies are not supported.")
    # Not `request.body()`, which would keep megabytes of base64 while the request waits.
    body, bounds = bytearray(), JsonBounds(max_text_bytes, image_fields)
    async for chunk in request.stream():
        bounds.feed(chunk)
        body += chunk
    charset = _CHARSET.search(content_type)
    return parse_json_object(body, charset[1] if charset else None)


def parse_json_object(data: bytes | bytearray, charset: str | None = None) -> dict[str, Any]:
    """Parse strict JSON, with or without a byte order mark; see `read_json_object`.

    Args:
        charset: that the client declared; only for the error message, because JSON is in UTF-8 whatever it
            says.
    """
    try:
        body = json.loads(data.decode("utf-8-sig"), **_PARSER_OPTIONS)
    except InvalidRequestError:
        raise
    except RecursionError:
        raise InvalidRequestError("The body is nested too deeply.", code="invalid_json") from None
    except ValueError:  # also invalid UTF-8 and integers of thousands of digits
        if charset is None or charset.lower() in _UTF_8:
            charset = json.detect_encoding(bytes(data[:4]))
        reason = "" if charset in _UTF_8 else f": it is in {charset}, and JSON must be in UTF-8"
        raise InvalidRequestError(f"The body is not valid JSON{reason}.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise InvalidRequestError("The body must be a JSON object.", code="invalid_json")
    fields = cast(dict[str, Any], body)
    return {name: value for name, value in fields.items() if value is not None}


def to_number(text: str) -> int | float:
    """Parse a JSON number, where 7.0 is an integer too."""
    number = float(text)
    return int(number) if number.is_integer() else number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Parsers disagree on duplicate keys: a proxy could validate one value while we use the other.
    values = dict(pairs)
    if len(values) != len(pairs):
        raise InvalidRequestError("The body has a duplicate field.", code="invalid_json")
    return values


def _reject_constant(name: str) -> None:
    raise InvalidRequestError(f"{name} is not valid JSON.", code="invalid_json")


_PARSER_OPTIONS: dict[str, Any] = {
    "object_pairs_hook": _unique,
    "parse_constant": _reject_constant,
    "parse_float": to_number,
}
