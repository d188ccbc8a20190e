"""Reading multipart forms: the same fields as JSON, with pictures as files.

Forms carry only text, so numbers and booleans are recognised by the type of their field.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from functools import cache
from typing import Any, cast

from pydantic import BaseModel
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from hypergen.api.request_body import MAX_TEXT_BYTES, JsonBounds, parse_json_object, text_too_large, to_number
from hypergen.errors import InvalidRequestError, UnsupportedMediaTypeError

MAX_INPUT_IMAGES = 16
_MAX_FILES = 32
_MAX_FIELDS = 200
# The base64 of a picture may stand in a field; the limit of the whole body is what counts.
_MAX_FIELD_BYTES = 2**30

# Beside the parts' own; what looks like a boundary is looked at byte by byte.
_MAX_BOUNDARIES = _MAX_FILES + _MAX_FIELDS + 1
_MAX_HEADER_BYTES = 1024
# Others may be decoded in time that grows with the square of the text, such as punycode.
_CHARSETS = {"utf-8", "ascii", "iso8859-1", "iso8859-15", "cp1252"}

_IMAGE = re.compile(r"image(?:\[([0-9]{0,3})\])?", re.ASCII)
_IMAGES = {"mask", "control_image", "controlnet_image", "images"}
_NESTED = re.compile(r"([^\[\]]{1,100})\[([^\[\]]{0,100})\]")
_INTEGER = re.compile(r"-?[0-9]{1,20}", re.ASCII)
_NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?", re.ASCII)
_BOOLEANS = {"true": True, "false": False}


class _Parser(MultiPartParser):
    """Starlette's parser, which also notices a form that was cut off, and text in another encoding
    than the form says, which Starlette would take for Latin-1, and bounds headers and texts.
    """

    ended = False

    def __init__(self, request: Request, max_text_bytes: int) -> None:
        content_type = request.headers["content-type"]
        if len(content_type) > _MAX_HEADER_BYTES:  # its options are read in time that grows with their square
            raise MultiPartException(f"Its content type is longer than {_MAX_HEADER_BYTES:,} bytes.")
        boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
        super().__init__(
            request.headers,
            _with_few_boundaries(request.stream(), boundary),
            max_files=_MAX_FILES,
            max_fields=_MAX_FIELDS,
            max_part_size=_MAX_FIELD_BYTES,
        )
        self._max_text_bytes = max_text_bytes
        self._text_bytes = 0

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        super().on_header_value(data, start, end)
        if len(self._current_partial_header_value) > _MAX_HEADER_BYTES:
            raise MultiPartException(f"A header of a part is longer than {_MAX_HEADER_BYTES:,} bytes.")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._current_part.file is None and not _is_image(self._current_part.field_name):
            self._text_bytes += end - start
            if self._text_bytes > self._max_text_bytes:
                raise text_too_large(self._max_text_bytes)
        super().on_part_data(data, start, end)

    def on_end(self) -> None:
        self.ended = True

    def close(self) -> None:
        """Remove what was read from the disk, also of a part that was cut off."""
        for file in self._files_to_close_on_error:
            file.close()

    def on_part_end(self) -> None:
        if self._current_part.file is None:
            if self._charset not in _CHARSETS:
                raise MultiPartException("Text must be in UTF-8.")
            try:
                self._current_part.data.decode(self._charset)
            except UnicodeDecodeError:
                raise MultiPartException("Text is not in the encoding of the form.") from None
        super().on_part_end()


async def _with_few_boundaries(stream: AsyncGenerator[bytes], boundary: bytes) -> AsyncGenerator[bytes]:
    """The same chunks, as long as the boundary stands in them as often as parts may, and without padding."""
    delimiter, found, end = b"\r\n--" + boundary, 0, b""
    async for chunk in stream:
        seen = end + chunk
        found += seen.count(delimiter) - end.count(delimiter)
        if found > _MAX_BOUNDARIES:
            raise MultiPartException(f"It has more than {_MAX_BOUNDARIES} parts.")
        if any(delimiter + padding in seen for padding in (b" ", b"\t")):
            raise MultiPartException("Its boundary has spaces behind it.")
        end = seen[-len(delimiter) :]
        yield chunk


def _is_image(name: str) -> bool:
    return name in _IMAGES or _IMAGE.fullmatch(name) is not None


def is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data"


async def read_form(
    request: Request, fields: type[BaseModel], max_text_bytes: int = MAX_TEXT_BYTES
) -> dict[str, Any]:
    """A multipart form as the body that JSON would have, with files as bytes.

    `image`, `image[]` and `image[0]` become the list `image`, in this order, also where there are none;
    `name[key]` becomes an entry of the object `name`. Empty text and `null` count as not given, because a
    form cannot say null.

    Args:
        fields: whose types tell what text is a number.
        max_text_bytes: of all fields together that are no files and no input images.

    Raises:
        PayloadTooLargeError: there is more text.
        InvalidRequestError: the form is broken or cut off, has too many parts, or a field twice.
        UnsupportedMediaTypeError: the body is compressed.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaTypeError("Compressed request bodies are not read.")
    try:
        parser = _Parser(request, max_text_bytes)
        form = await parser.parse()
    except MultiPartException as error:
        too_many = error.message.startswith("Too many files")
        raise InvalidRequestError(
            f"'image': {error.message}" if too_many else f"The form cannot be read: {error.message}",
            param="image" if too_many else None,
            code="invalid_form",
        ) from None
    except (MultipartParseError, ValueError):  # also a charset that Python knows and text cannot have
        raise InvalidRequestError("The form cannot be read.", code="invalid_form") from None
    try:
        if not parser.ended:
            raise InvalidRequestError("The form is cut off.", code="invalid_form")
        items = [
            (name, await value.read() if isinstance(value, UploadFile) else value)
            for name, value in form.multi_items()
        ]
    finally:
        parser.close()
    return _to_body(items, fields)


def _to_body(items: list[tuple[str, str | bytes]], fields: type[BaseModel]) -> dict[str, Any]:
    kinds = _kinds(fields)
    body: dict[str, Any] = {}
    images: list[tuple[int, str | bytes]] = []
    for name, value in items:
        if value in ("", "null"):
            continue
        if match := _IMAGE.fullmatch(name):
            images.append((int(match[1] or 0), value))
        elif match := _NESTED.fullmatch(name):
            inner = body.setdefault(match[1], {})
            if not isinstance(inner, dict) or match[2] in inner:
                if match[1] not in kinds:  # unknown fields are ignored, whatever they are
                    continue
                raise _twice(match[1])
            cast(dict[str, Any], inner)[match[2]] = _typed(value, {"number"})
        elif name in body:
            if name in kinds or name == "mask":
                raise _twice(name)
        else:
            body[name] = _typed(value, kinds.get(name, set()))
    if images or "images" not in body:
        body["image"] = [value for _, value in sorted(images, key=lambda image: image[0])]
    return body


@cache
def _kinds(fields: type[BaseModel]) -> dict[str, set[str]]:
    """Field to the JSON types that it takes."""
    schemas: dict[str, dict[str, Any]] = fields.model_json_schema()["properties"]
    return {
        name: {option.get("type", "") for option in (schema, *schema.get("anyOf", []))}
        for name, schema in schemas.items()
    }


def _typed(value: str | bytes, kinds: set[str]) -> Any:
    """Text as what it says if the field takes that; what does not fit stays text and is refused later."""
    if isinstance(value, bytes):
        return value
    if "integer" in kinds and _INTEGER.fullmatch(value):
        return int(value)
    if kinds & {"integer", "number"} and _NUMBER.fullmatch(value):
        return to_number(value)
    if "object" in kinds and value.startswith("{"):  # how OpenAPI says that a form holds an object
        data = value.encode()
        JsonBounds(len(data)).feed(data)
        return parse_json_object(data)
    if "boolean" in kinds:
        return _BOOLEANS.get(value, value)
    return value


def _twice(name: str) -> InvalidRequestError:
    return InvalidRequestError(f"The form has the field '{name}' twice.", param=name, code="invalid_form")
