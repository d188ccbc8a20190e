"""Parsing of multipart forms."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from hypergen.api.dialects import openai_edits
from hypergen.api.dialects.endpoints import IMAGE_FIELDS
from hypergen.api.multipart_form import read_form
from hypergen.errors import InvalidRequestError
from tests.support.full_capability_model import FULL_MODEL_INFO, SETTINGS
from tests.support.image_files import as_file, gradient

INPUT_IMAGE = as_file(gradient(96, 64))


def form_of(parts: list[Any], data: dict[str, Any] | None = None) -> dict[str, Any]:
    """A form as httpx sends it, parsed by `read_form` in small chunks."""
    request = httpx.Request("POST", "http://x/", files=parts, data=data)
    return read(request.read(), request.headers["content-type"])


def read(content: bytes, content_type: str) -> dict[str, Any]:
    pieces = [content[start : start + 1000] for start in range(0, len(content), 1000)]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": pieces.pop(0) if pieces else b"", "more_body": bool(pieces)}

    headers = [(b"content-type", content_type.encode())]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    return asyncio.run(read_form(Request(scope, receive), openai_edits.EditBody, IMAGE_FIELDS))


def test_all_names_of_image_fields_are_accepted_and_sorted_by_number() -> None:
    parts = [("prompt", (None, "a")), ("n", (None, "2"))]
    assert form_of([("image", ("upload", b"1")), *parts])["image"] == [b"1"]
    assert form_of([("image[]", ("a.png", b"1")), *parts, ("image[]", ("b.png", b"2"))])["image"] == [
        b"1",
        b"2",
    ]
    numbered = [("image[1]", ("b", b"2")), *parts, ("image[0]", ("a", b"1"))]
    assert form_of(numbered) == {"image": [b"1", b"2"], "prompt": "a", "n": 2}


def test_text_is_converted_by_the_type_of_its_field() -> None:
    text = {
        "prompt": "42",
        "n": "2",
        "guidance_scale": "3",
        "strength": "0.25",
        "stream": "false",
        "enable_refiner": "true",
        "seed": "9223372036854775807",
        "size": "64x64",
        "unknown": "7",
    }
    assert form_of([("image", (None, "x"))], text) == {
        "prompt": "42",
        "n": 2,
        "guidance_scale": 3.0,
        "strength": 0.25,
        "stream": False,
        "enable_refiner": True,
        "seed": 2**63 - 1,
        "size": "64x64",
        "unknown": "7",
        "image": ["x"],
    }


def test_empty_text_and_null_mean_absent() -> None:
    assert form_of([("image", ("a", b"1"))], {"model": "", "mask": "null", "user": ""}) == {"image": [b"1"]}


def test_unknown_fields_may_be_duplicated() -> None:
    parts = [("a", (None, "1")), ("a", (None, "2")), ("b[x]", (None, "1")), ("b[x]", (None, "2"))]
    assert form_of([("prompt", (None, "p")), *parts])["prompt"] == "p"


def test_objects_may_be_json() -> None:
    assert form_of([("loras", (None, '{"a": 0.5}', "application/json"))])["loras"] == {"a": 0.5}
    for text in ('{"a": 0.5', '{"a": 1, "a": 2}', '{"a": NaN}'):
        with pytest.raises(InvalidRequestError):
            form_of([("loras", (None, text))])


def test_integers_may_be_written_as_decimals() -> None:
    form = form_of([("n", (None, "2.0")), ("seed", (None, "1e3"))])
    assert (form["n"], form["seed"]) == (2, 1000)
    assert form_of([("n", (None, "2.5"))])["n"] == 2.5


def test_objects_may_be_names_with_brackets() -> None:
    parts = [("image", ("a", b"1")), ("a[x]", (None, "0.5")), ("a[y]", (None, "z"))]
    assert form_of(parts) == {"image": [b"1"], "a": {"x": 0.5, "y": "z"}}


def test_text_is_utf_8_or_the_declared_charset() -> None:
    assert form_of([("image", ("a", b"1")), ("prompt", (None, "é"))])["prompt"] == "é"
    latin = PART.replace(b"\na\r", b"\n\xe9\r") + b"--b--\r\n"
    assert read(latin, "multipart/form-data; boundary=b; charset=latin-1")["prompt"] == "é"
    with pytest.raises(InvalidRequestError, match="encoding"):
        read(latin, "multipart/form-data; boundary=b")


@pytest.mark.parametrize("value", ["1.5", "two", "1e3", "\uff12", "0x2", " 2", "1_0", "true", "9" * 30])
def test_text_that_is_not_a_number_is_rejected_with_its_param(value: str) -> None:
    body = form_of([("image", ("a", INPUT_IMAGE))], {"prompt": "a", "n": value})
    with pytest.raises(InvalidRequestError) as raised:
        openai_edits.to_edit(body, FULL_MODEL_INFO, SETTINGS, "id")
    assert raised.value.param == "n"


BOUNDARY = b"--b\r\n"
PART = BOUNDARY + b'Content-Disposition: form-data; name="prompt"\r\n\r\na\r\n'
MALFORMED = {
    "empty": (b"", "multipart/form-data; boundary=b"),
    "no boundary": (PART + b"--b--\r\n", "multipart/form-data"),
    "another boundary": (PART + b"--b--\r\n", "multipart/form-data; boundary=c"),
    "truncated": (PART, "multipart/form-data; boundary=b"),
    "truncated in the headers": (PART[:30], "multipart/form-data; boundary=b"),
    "no name": (
        BOUNDARY + b"Content-Disposition: form-data\r\n\r\na\r\n--b--\r\n",
        "multipart/form-data; boundary=b",
    ),
    "no headers": (BOUNDARY + b"\r\na\r\n--b--\r\n", "multipart/form-data; boundary=b"),
    "unknown charset": (PART + b"--b--\r\n", "multipart/form-data; boundary=b; charset=undefined"),
    "duplicate field": (PART + PART + b"--b--\r\n", "multipart/form-data; boundary=b"),
    "endless headers": (
        BOUNDARY
        + b'Content-Disposition: form-data; name="a"\r\n'
        + b"X: y\r\n" * 5000
        + b"\r\na\r\n--b--\r\n",
        "multipart/form-data; boundary=b",
    ),
}


@pytest.mark.parametrize(("content", "content_type"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_form_is_rejected(content: bytes, content_type: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        read(content, content_type)
    assert raised.value.code == "invalid_form"


def test_too_many_parts_are_rejected() -> None:
    with pytest.raises(InvalidRequestError) as raised:
        form_of([("image[]", ("a", b"x"))] * 33)
    assert raised.value.param == "image"
    assert "'image'" in raised.value.message
    with pytest.raises(InvalidRequestError):
        form_of([(f"field{number}", (None, "x")) for number in range(201)])
