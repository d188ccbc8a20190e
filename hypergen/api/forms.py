"""Reading multipart forms: the same fields as JSON, with pictures as files.

Forms carry only text, so numbers and booleans are recognised by the type of their field.
"""

from __future__ import annotations

import re
from typing import Any, cast

from pydantic import BaseModel
from python_multipart.exceptions import MultipartParseError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from hypergen.api.limits import parse_json_object, to_number
from hypergen.errors import InvalidRequestError, UnsupportedMediaTypeError

MAX_PICTURES = 16
_MAX_FILES = 32
_MAX_FIELDS = 200
# The base64 of a picture may stand in a field; the limit of the whole body is what counts.
_MAX_FIELD_BYTES = 2**30

_IMAGE = re.compile(r"image(?:\[([0-9]{0,3})\])?", re.ASCII)
_NESTED = re.compile(r"([^\[\]]{1,100})\[([^\[\]]{0,100})\]")
_INTEGER = re.compile(r"-?[0-9]{1,20}", re.ASCII)
_NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?", re.ASCII)
_BOOLEANS = {"true": True, "false": False}


class _Parser(MultiPartParser):
    """Starlette's parser, which also notices a form that was cut off, and text in another encoding
    than the form says, which Starlette would take for Latin-1.
    """

    ended = False

    def on_end(self) -> None:
        self.ended = True

    def on_part_end(self) -> None:
        if self._current_part.file is None:
            try:
                self._current_part.data.decode(self._charset)
            except (UnicodeDecodeError, LookupError):
                raise MultiPartException("Text is not in the encoding of the form.") from None
        super().on_part_end()


def is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data"


async def read_form(request: Request, fields: type[BaseModel]) -> dict[str, Any]:
    """A multipart form as the body that JSON would have, with files as bytes.

    `image`, `image[]` and `image[0]` become the list `image`, in this order, also where there are none;
    `name[key]` becomes an entry of the object `name`. Empty text and `null` count as not given, because a
    form cannot say null.

    Args:
        fields: whose types tell what text is a number.

    Raises:
        InvalidRequestError: the form is broken or cut off, has too many parts, or a field twice.
        UnsupportedMediaTypeError: the body is compressed.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaTypeError("Compressed request bodies are not read.")
    parser = _Parser(
        request.headers,
        request.stream(),
        max_files=_MAX_FILES,
        max_fields=_MAX_FIELDS,
        max_part_size=_MAX_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        too_many = error.message.startswith("Too many files")
        raise InvalidRequestError(
            f"The form cannot be read: {error.message}",
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
        await form.close()
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
        return parse_json_object(value.encode())
    if "boolean" in kinds:
        return _BOOLEANS.get(value, value)
    return value


def _twice(name: str) -> InvalidRequestError:
    return InvalidRequestError(f"The form has the field '{name}' twice.", param=name, code="invalid_form")
