"""JSON bodies that are built to use much time or memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from hypergen.api.dialects import hyperbolic, openai_images
from hypergen.api.dialects.endpoints import IMAGE_FIELDS
from hypergen.api.request_body import JsonBounds, parse_json_object, read_json_object
from hypergen.api.validation import validate
from hypergen.config import ServerSettings
from hypergen.errors import InvalidRequestError, PayloadTooLargeError
from tests.support.parser_costs import growth, memory, refusal

MAX_TEXT_BYTES = 1_000_000
IMAGE = b'{"image":"'


def read(data: bytes, chunk: int = 65_536, content_type: str = "application/json") -> dict[str, Any]:
    """Parse a body that arrives in chunks."""
    starts = iter(range(0, len(data) or 1, chunk))

    async def receive() -> dict[str, Any]:
        start = next(starts)
        return {
            "type": "http.request",
            "body": data[start : start + chunk],
            "more_body": start + chunk < len(data),
        }

    headers = [(b"content-type", content_type.encode())]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    return asyncio.run(read_json_object(Request(scope, receive), False, MAX_TEXT_BYTES, IMAGE_FIELDS))


def of_size(start: bytes, size: int) -> bytes:
    return start + b"a" * (size - len(start) - 2) + b'"}'


def test_a_body_without_input_images_may_have_1_000_000_bytes() -> None:
    assert ServerSettings.model_validate({}).max_text_body_mb * 1e6 == MAX_TEXT_BYTES
    assert read(of_size(b'{"prompt":"', MAX_TEXT_BYTES))
    with pytest.raises(PayloadTooLargeError, match="without input images may have at most 1,000,000 bytes"):
        read(of_size(b'{"prompt":"', MAX_TEXT_BYTES + 1))


def test_a_too_large_body_without_input_images_is_rejected_before_it_is_complete() -> None:
    bounds = JsonBounds(MAX_TEXT_BYTES, IMAGE_FIELDS)
    bounds.feed(of_size(b'{"prompt":"', MAX_TEXT_BYTES))
    with pytest.raises(PayloadTooLargeError):
        bounds.feed(b" ")


@pytest.mark.parametrize("field", ["image", "images", "mask", "control_image", "controlnet_image"])
@pytest.mark.parametrize("chunk", [1, 7, 20, 3_000_000])
def test_a_body_with_an_input_image_may_be_larger_with_any_chunk_size(field: str, chunk: int) -> None:
    start = b'{"prompt": "a", "%s": "' % field.encode()
    bounds = JsonBounds(100, IMAGE_FIELDS)
    data = of_size(start, 3000)
    for at in range(0, len(data), chunk):
        bounds.feed(data[at : at + chunk])


@pytest.mark.parametrize("name", [b"image", b"prompt image", b"images_", b"'image'"])
def test_other_names_are_not_input_images(name: bytes) -> None:
    with pytest.raises(PayloadTooLargeError):
        JsonBounds(100, IMAGE_FIELDS).feed(of_size(b'{"%s_": "' % name, 3000))


@pytest.mark.parametrize("token", [b"[", b"{", b",", b":"])
def test_a_body_may_have_100_000_tokens(token: bytes) -> None:
    bounds = JsonBounds(MAX_TEXT_BYTES, IMAGE_FIELDS)
    bounds.feed(token * 60_000)
    bounds.feed(token * 40_000)
    with pytest.raises(InvalidRequestError, match="100,000 JSON tokens") as raised:
        bounds.feed(token)
    assert raised.value.code == "invalid_json"


def test_at_most_three_copies_of_a_large_image_are_in_memory_while_it_is_parsed() -> None:
    """As bytes, as text, and as the text of its field."""
    assert memory(read, of_size(IMAGE, 6_000_000)) < 3.3


def test_slashes_may_be_escaped_as_in_php() -> None:
    """One in 64 characters of base64 is a slash; here it is every second one."""
    assert read(IMAGE + b"a\\/" * 2_000_000 + b'"}') == {"image": "a/" * 2_000_000}


BODIES: dict[str, Callable[[int], bytes]] = {
    "lists": lambda size: b'{"image":[' + b"[]," * (size // 3) + b"1]}",
    "objects": lambda size: b'{"image":[' + b'{"":{}},' * (size // 8) + b"1]}",
    "brackets": lambda size: b"[" * size,
    "backslashes": lambda size: IMAGE + b"\\\\" * (size // 2) + b'"}',
    "escapes": lambda size: IMAGE + b"\\/a" * (size // 3) + b'"}',
    "code points": lambda size: IMAGE + b"\\u4e2d" * (size // 6) + b'"}',
    "surrogates": lambda size: IMAGE + b"\\ud83d\\ude00a" * (size // 13) + b'"}',
    "digits": lambda size: b'{"image":' + b"1" * size + b"}",
    "decimals": lambda size: b'{"image":1.' + b"1" * size + b"}",
    "exponents": lambda size: b'{"image":1e' + b"1" * size + b"}",
    "integers": lambda size: b'{"image":[' + (b"1" * 4000 + b",") * (size // 4001) + b"1]}",
    "spaces": lambda size: b'{"image":' + b" " * size + b"1}",
    "text": lambda size: IMAGE + b"a" * size + b'"}',
    "no end": lambda size: IMAGE + b"a" * size,
    "broken UTF-8": lambda size: IMAGE + b"\xff" * size,
    "keys": lambda size: b'{"image":1,"' + b'":1,"'.join(b"%09d" % at for at in range(size // 14)) + b'":1}',
}


@pytest.mark.parametrize("make", BODIES.values(), ids=BODIES)
def test_parsing_takes_time_and_memory_proportional_to_the_body_size(make: Callable[[int], bytes]) -> None:
    assert growth(read, make, 1_000_000) < 3
    assert memory(read, make(1_000_000)) < 12


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.binary() | st.text('{}[]:,"\\u0dnul1e.- ').map(str.encode), st.integers(1, 9))
def test_arbitrary_bytes_are_parsed_or_rejected(data: bytes, chunk: int) -> None:
    assert refusal(lambda: read(data, chunk)) or isinstance(parse_json_object(data), dict)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), json_values))
def test_any_json_object_is_parsed_unchanged(body: dict[str, Any]) -> None:
    given_fields = {name: value for name, value in body.items() if value is not None}
    assert read(json.dumps(body).encode()) == given_fields
    assert read(json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")) == given_fields


@pytest.mark.parametrize("name", openai_images.ImagesBody.model_fields)
@pytest.mark.parametrize("value", [["x"] * 65, {str(number): "x" for number in range(65)}])
def test_a_field_with_more_than_64_entries_is_rejected_with_its_param(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        validate(openai_images.ImagesBody, {"prompt": "a", name: value})
    assert raised.value.param == name
    assert raised.value.message == f"'{name}' may have at most 64 entries."


def test_64_loras_are_validated() -> None:
    loras = {str(number): 1 for number in range(64)}
    assert validate(openai_images.ImagesBody, {"prompt": "a", "loras": loras}).loras == loras
    body = {"prompt": "a", "model_name": "m", "lora": {**loras, "64": "x"}}
    assert refusal(lambda: validate(hyperbolic.ImageGenerationRequest, body))
