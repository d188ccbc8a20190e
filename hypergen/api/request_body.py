"""Reading a request's body: within limits, and only as strict JSON."""

from __future__ import annotations

import asyncio
import json
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

# A body may stall for as long as this, and come at no less than this.
_PATIENCE_S = 30.0
_SLOWEST_BYTES_PER_S = 10_000
# As in the settings.
MAX_TEXT_BYTES = 1_000_000
_MAX_TOKENS = 100_000
MAX_ITEMS = 64  # of one native call; each is checked on the event loop


class BodyMemory:
    """What the bodies that are being read, and wait to be parsed, may take together."""

    # Of each body so much is not counted, so that requests without input images go on beside others' images.
    FREE_BYTES = 64 * 1024

    def __init__(self, max_bytes: float) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0


class BodyLimit:
    """Watches over one request's body: its bytes, by its header first and then as they come, its pace, and
    the memory that all bodies share.

    Attributes:
        error: what was found wrong.
    """

    def __init__(self, scope: Scope, receive: Receive, max_bytes: int, memory: BodyMemory) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._memory = memory
        self._held = 0
        self._received = 0
        self._whole = False
        self._began_at = time.monotonic()
        declared = any(
            name == b"content-length" and value.isdigit() and int(value[:20]) > max_bytes
            for name, value in scope["headers"]
        )
        self.error: RequestError | None = self._too_large() if declared else None

    async def receive(self) -> Message:
        if self._whole:  # then it is waited for a client that leaves
            return await self._receive()
        until = self._began_at + _PATIENCE_S + self._received / _SLOWEST_BYTES_PER_S
        try:
            async with asyncio.timeout(until - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            self.error = SlowBodyError("The body came too slowly.")
            raise self.error from None
        self._whole = not message.get("more_body")
        self._received += len(message.get("body", b""))
        if self._received > self._max_bytes:
            self.error = self._too_large()
            raise self.error
        self._hold(max(0, self._received - BodyMemory.FREE_BYTES))
        return message

    def release(self) -> None:
        """The body was read into what is counted elsewhere, or the request has ended."""
        self._hold(0)

    def _hold(self, size: int) -> None:
        self._memory.held_bytes += size - self._held
        self._held = size
        if size and self._memory.held_bytes > max(self._memory.max_bytes, size):  # one alone always fits
            self.release()
            self.error = QueueFullError(
                "The server is reading too many large requests. Try again in 5 s.", retry_after_s=5
            )
            raise self.error

    def _too_large(self) -> PayloadTooLargeError:
        return PayloadTooLargeError(
            f"The body is larger than the {self._max_bytes:,} bytes that this server reads."
        )


class JsonBounds:
    """How much a JSON body may hold, looked at as its bytes come, before anything is parsed.

    Parsing keeps the interpreter's lock, and with it the event loop: 10 s for 24 MB of empty lists.

    Args:
        max_text_bytes: the most bytes before one names a field of an input image.
        image_fields: the names of those fields.
    """

    def __init__(self, max_text_bytes: int, image_fields: Iterable[str] = ()) -> None:
        self._max_text_bytes = max_text_bytes
        self._names = [f'"{name}"'.encode() for name in image_fields]
        self._longest = max(map(len, self._names), default=1)
        self._received = 0
        self._tokens = 0
        self._has_image = False
        self._end = b""  # of what came before: a name may be split over two chunks

    def feed(self, chunk: bytes) -> None:
        """Look at the next bytes.

        Raises:
            PayloadTooLargeError: it is more than text needs, and no input image was named.
            InvalidRequestError: it is more tokens than a request needs.
        """
        self._received += len(chunk)
        # In texts too: base64 has none of them.
        self._tokens += sum(map(chunk.count, (b"[", b"{", b",", b":")))
        if self._tokens > _MAX_TOKENS:
            raise InvalidRequestError(
                f"The body has more than {_MAX_TOKENS:,} JSON tokens.", code="invalid_json"
            )
        if self._has_image:
            return
        seen = self._end + chunk
        self._has_image = any(name in seen for name in self._names)
        self._end = seen[-self._longest :]
        if self._received > self._max_text_bytes and not self._has_image:
            raise text_too_large(self._max_text_bytes)


def text_too_large(max_text_bytes: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"Bodies without input images may have at most {max_text_bytes:,} bytes.")


async def read_json_object(
    request: Request,
    or_form: bool = False,
    max_text_bytes: int = MAX_TEXT_BYTES,
    image_fields: Iterable[str] = (),
) -> dict[str, Any]:
    """The body as a JSON object; fields that are null are left out, they count as not given.

    Args:
        or_form: the caller would have read a form too; the error says so.
        max_text_bytes: of a body without input images.
        image_fields: that hold input images.

    Raises:
        UnsupportedMediaTypeError: the body is declared as something else, or compressed.
        PayloadTooLargeError: it is too large for one without input images.
        InvalidRequestError: it is not one JSON object in UTF-8 without duplicate keys, NaN or Infinity, or it
            has more tokens than are read.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        form = " or as a form, with 'multipart/form-data'" if or_form else ""
        raise UnsupportedMediaTypeError(
            f"Send the request as JSON, with 'Content-Type: application/json'{form}."
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaTypeError("Compressed request bodies are not read.")
    # Not `request.body()`, which would keep megabytes of base64 for as long as the request waits.
    body, bounds = bytearray(), JsonBounds(max_text_bytes, image_fields)
    async for chunk in request.stream():
        bounds.feed(chunk)
        body += chunk
    return parse_json_object(body)


def parse_json_object(data: bytes | bytearray) -> dict[str, Any]:
    """See `read_json_object`."""
    try:
        body = json.loads(data.decode("utf-8"), **_READERS)
    except InvalidRequestError:
        raise
    except RecursionError:
        raise InvalidRequestError("The body is nested too deeply.", code="invalid_json") from None
    except ValueError:  # also broken UTF-8 and numbers of thousands of digits
        raise InvalidRequestError("The body is not valid JSON.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise InvalidRequestError("The body must be a JSON object.", code="invalid_json")
    fields = cast(dict[str, Any], body)
    return {name: value for name, value in fields.items() if value is not None}


def to_number(text: str) -> int | float:
    """JSON has one kind of number: 7.0 is an integer too."""
    number = float(text)
    return int(number) if number.is_integer() else number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Parsers disagree on which of two equal keys counts, so a proxy could check one and we draw the other.
    values = dict(pairs)
    if len(values) != len(pairs):
        raise InvalidRequestError("The body names a field twice.", code="invalid_json")
    return values


def _refuse_constant(name: str) -> None:
    raise InvalidRequestError(f"{name} is not valid JSON.", code="invalid_json")


_READERS: dict[str, Any] = {
    "object_pairs_hook": _unique,
    "parse_constant": _refuse_constant,
    "parse_float": to_number,
}
