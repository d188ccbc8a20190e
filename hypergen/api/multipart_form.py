"""Parsing of multipart forms: the same fields as JSON, with images as files.

A form has only text, so numbers and booleans are converted by the type of their field.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Collection
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
# A field may contain the base64 of an image, so only the limit of the whole body counts.
_MAX_FIELD_BYTES = 2**30

# For the parts and the end. The parser goes byte by byte after everything that looks like a boundary.
_MAX_BOUNDARIES = _MAX_FILES + _MAX_FIELDS + 1
_MAX_HEADER_BYTES = 1024
# Others, such as punycode, may take quadratic time to decode.
_CHARSETS = {"utf-8", "ascii", "iso8859-1", "iso8859-15", "cp1252"}

_FILE = re.compile(r"(image|mask)(?:\[([0-9]{0,3})\])?", re.ASCII)
_NESTED = re.compile(r"([^\[\]]{1,100})\[([^\[\]]{0,100})\]")
_INTEGER = re.compile(r"-?[0-9]{1,20}", re.ASCII)
_NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?", re.ASCII)
_BOOLEANS = {"true": True, "false": False}


class _Parser(MultiPartParser):
    """Starlette's parser with limits for headers and text.

    It also detects a truncated form, and text that is not in the form's charset, which Starlette decodes as
    Latin-1.
    """

    ended = False

    def __init__(self, request: Request, image_fields: Collection[str], max_text_bytes: int) -> None:
        content_type = request.headers["content-type"]
        if len(content_type) > _MAX_HEADER_BYTES:  # its options take quadratic time to parse
            raise MultiPartException(f"Its content type is longer than {_MAX_HEADER_BYTES:,} bytes.")
        boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
        super().__init__(
            request.headers,
            _limit_boundaries(request.stream(), boundary),
            max_files=_MAX_FILES,
            max_fields=_MAX_FIELDS,
            max_part_size=_MAX_FIELD_BYTES,
        )
        self._image_fields = image_fields
        self._max_text_bytes = max_text_bytes
        self._text_bytes = 0

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        super().on_header_value(data, start, end)
        if len(self._current_partial_header_value) > _MAX_HEADER_BYTES:
            raise MultiPartException(f"A header of a part is longer than {_MAX_HEADER_BYTES:,} bytes.")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._current_part.file is None and not self._is_image(self._current_part.field_name):
            self._text_bytes += end - start
            if self._text_bytes > self._max_text_bytes:
                raise text_too_large(self._max_text_bytes)
        super().on_part_data(data, start, end)

    def _is_image(self, name: str) -> bool:
        return name in self._image_fields or _FILE.fullmatch(name) is not None

    def on_end(self) -> None:
        self.ended = True

    def close(self) -> None:
        """Delete temporary files, also of a truncated part."""
        for file in self._files_to_close_on_error:
            file.close()

    def on_part_end(self) -> None:
        if self._current_part.file is None:
            if self._charset not in _CHARSETS:
                raise MultiPartException("Text must be in UTF-8.")
            try:
                self._current_part.data.decode(self._charset)
            except UnicodeDecodeError:
                raise MultiPartException("Text is not in the encoding that the form declares.") from None
        super().on_part_end()


async def _limit_boundaries(stream: AsyncGenerator[bytes], boundary: bytes) -> AsyncGenerator[bytes]:
    """The same chunks; raises if they contain too many boundaries, or a boundary with padding."""
    delimiter, found, end = b"\r\n--" + boundary, 0, b""
    async for chunk in stream:
        seen = end + chunk
        found += seen.count(delimiter) - end.count(delimiter)
        if found > _MAX_BOUNDARIES:
            raise MultiPartException(f"It has more than {_MAX_BOUNDARIES} parts.")
        if any(delimiter + padding in seen for padding in (b" ", b"\t")):
            raise MultiPartException("Its boundary is followed by spaces.")
        end = seen[-len(delimiter) :]
        yield chunk


def is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data"


async def read_form(
    request: Request,
    fields: type[BaseModel],
    image_fields: Collection[str],
    max_text_bytes: int = MAX_TEXT_BYTES,
) -> dict[str, Any]:
    """A multipart form as a JSON-like body, with files as bytes.

    `image`, `image[]` and `image[0]` become the list `image`, sorted by number; it is empty without them. The
    same names of `mask` become the list `mask`, which is absent without them. `name[key]` becomes an entry of
    the object `name`. Empty text and `null` mean null.

    Args:
        fields: the model whose field types decide the conversion of text.
        image_fields: fields with input images, which may be larger than text.
        max_text_bytes: limit for all text together, without input images.

    Raises:
        PayloadTooLargeError: too much text.
        InvalidRequestError: the form is malformed or truncated, has too many parts, or has a field twice.
        UnsupportedMediaTypeError: the body is compressed.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaTypeError("Compressed request bodies are not supported.")
    try:
        parser = _Parser(request, image_fields, max_text_bytes)
        form = await parser.parse()
    except MultiPartException as error:
        too_many = error.message.startswith("Too many files")
        raise InvalidRequestError(
            f"'image': {error.message}" if too_many else f"The form is malformed: {error.message}",
            param="image" if too_many else None,
            code="invalid_form",
        ) from None
    except (MultipartParseError, ValueError):  # also codecs that are not text encodings
        raise InvalidRequestError("The form is malformed.", code="invalid_form") from None
    try:
        if not parser.ended:
            raise InvalidRequestError("The form is truncated.", code="invalid_form")
        items = [
            (name, await value.read() if isinstance(value, UploadFile) else value)
            for name, value in form.multi_items()
        ]
    finally:
        parser.close()
    return _to_body(items, fields)


def _to_body(items: list[tuple[str, str | bytes]], fields: type[BaseModel]) -> dict[str, Any]:
    types = _json_types(fields)
    body: dict[str, Any] = {}
    files: dict[str, list[tuple[int, str | bytes]]] = {"image": [], "mask": []}
    for name, value in items:
        if value in ("", "null"):
            continue
        if match := _FILE.fullmatch(name):
            files[match[1]].append((int(match[2] or 0), value))
        elif match := _NESTED.fullmatch(name):
            inner = body.setdefault(match[1], {})
            if not isinstance(inner, dict) or match[2] in inner:
                if match[1] not in types:  # unknown fields are ignored
                    continue
                raise _duplicate_field(match[1])
            cast(dict[str, Any], inner)[match[2]] = _convert(value, {"number"})
        elif name in body:
            if name in types:
                raise _duplicate_field(name)
        else:
            body[name] = _convert(value, types.get(name, set()))
    sorted_files = {
        name: [value for _, value in sorted(numbered, key=lambda file: file[0])]
        for name, numbered in files.items()
    }
    if sorted_files["image"] or "images" not in body:
        body["image"] = sorted_files["image"]
    if sorted_files["mask"]:
        body["mask"] = sorted_files["mask"]
    return body


@cache
def _json_types(fields: type[BaseModel]) -> dict[str, set[str]]:
    """Field name -> its JSON types."""
    schemas: dict[str, dict[str, Any]] = fields.model_json_schema()["properties"]
    return {
        name: {variant.get("type", "") for variant in (schema, *schema.get("anyOf", []))}
        for name, schema in schemas.items()
    }


def _convert(value: str | bytes, types: set[str]) -> Any:
    """Convert text to one of the field's types; otherwise it stays text, and validation rejects it."""
    if isinstance(value, bytes):
        return value
    if "integer" in types and _INTEGER.fullmatch(value):
        return int(value)
    if types & {"integer", "number"} and _NUMBER.fullmatch(value):
        return to_number(value)
    if "object" in types and value.startswith("{"):  # OpenAPI's encoding of objects in forms
        data = value.encode()
        JsonBounds(len(data)).feed(data)
        return parse_json_object(data)
    if "boolean" in types:
        return _BOOLEANS.get(value, value)
    return value


def _duplicate_field(name: str) -> InvalidRequestError:
    return InvalidRequestError(f"The form has the field '{name}' twice.", param=name, code="invalid_form")
