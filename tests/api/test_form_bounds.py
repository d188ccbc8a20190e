"""Forms that are built to use much time or memory."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypergen.api.dialects import openai_edits
from hypergen.api.multipart_form import _to_body  # pyright: ignore[reportPrivateUsage]  its own parser, without HTTP
from hypergen.errors import InvalidRequestError, PayloadTooLargeError
from tests.api.test_multipart_form import INPUT_IMAGE, form_of, read
from tests.support.full_capability_model import FULL_MODEL_INFO, SETTINGS
from tests.support.parser_costs import growth, memory, refusal

END = b"--b--\r\n"


def part(name: str, data: bytes = b"x", file: bool = False, more: bytes = b"") -> bytes:
    filename = b'; filename="a"' if file else b""
    head = b'--b\r\nContent-Disposition: form-data; name="%s"%s%s' % (name.encode(), filename, more)
    return head + b"\r\n\r\n" + data + b"\r\n"


def read_parts(parts: bytes, charset: str = "") -> dict[str, Any]:
    return read(parts, f"multipart/form-data; boundary=b{charset}")


def image(data: bytes) -> bytes:
    return part("image", data, file=True) + END


BODIES: dict[str, Callable[[int], bytes]] = {
    "boundaries with text behind": lambda size: image(b"\r\n--bX" * (size // 6)),
    "almost final boundaries": lambda size: image(b"\r\n--b-X" * (size // 7)),
    "starts of boundaries": lambda size: image(b"\r\n--" * (size // 4)),
    "carriage returns": lambda size: image(b"\r" * size),
    "line breaks": lambda size: image(b"\r\n" * (size // 2)),
    "padding": lambda size: part("image") + b"--b" + b" " * size + b"\r\n" + END,
    "line breaks before": lambda size: b"\r\n" * (size // 2) + image(b"x"),
    "hyphens before": lambda size: b"\r\n" + b"-" * size + image(b"x"),
    "parts": lambda size: part("a") * (size // 60) + END,
    "parts after the end": lambda size: image(b"x") + part("a") * (size // 60),
    "a header": lambda size: b"--b\r\nX: " + b"a" * size,
    "a header's name": lambda size: b"--b\r\n" + b"a" * size,
    "headers": lambda size: b"--b\r\n" + b"X: y\r\n" * (size // 6),
    "parameters": lambda size: part("a", more=b";" * 4000) * (size // 4000) + END,
    "entries": lambda size: (
        part("loras", json.dumps(dict.fromkeys(map(str, range(size // 12)), 1)).encode()) + END
    ),
    "an image in text": lambda size: part("image", b"a" * size) + END,
    "a file": lambda size: image(b"a" * size),
}


@pytest.mark.parametrize("make", BODIES.values(), ids=BODIES)
def test_parsing_takes_time_and_memory_proportional_to_the_form_size(make: Callable[[int], bytes]) -> None:
    assert growth(read_parts, make, 500_000) < 3
    assert memory(read_parts, make(1_000_000)) < 8


@pytest.mark.parametrize("piece", [b"\r\n--bX" * 300, b"\r\n--b ", b"\r\n--b\t"])
def test_300_false_boundaries_are_rejected(piece: bytes) -> None:
    """After each the parser goes byte by byte; a form may have 233 of them, without padding."""
    with pytest.raises(InvalidRequestError, match=r"more than 233 parts|followed by spaces") as raised:
        read_parts(image(b"x" + piece))
    assert raised.value.code == "invalid_form"


@pytest.mark.parametrize("charset", ["punycode", "idna", "utf-7", "unicode_escape", "utf-16", "x", "zlib"])
def test_text_in_other_encodings_is_rejected(charset: str) -> None:
    """Python decodes punycode in quadratic time: 10 s for 0.6 MB."""
    text = part("prompt", b"-" + b"a" * 100_000) + END
    with pytest.raises(InvalidRequestError) as raised:
        read_parts(text, f"; charset={charset}")
    assert raised.value.code == "invalid_form"


def test_the_text_of_a_form_may_have_1_000_000_bytes() -> None:
    parts = part("prompt", b"a" * 400_000) + part("other", b"a" * 600_000)
    assert read_parts(parts + END)
    with pytest.raises(PayloadTooLargeError, match="1,000,000 bytes"):
        read_parts(parts + part("n", b"1") + END)


@pytest.mark.parametrize("name", ["image", "image[]", "image[2]", "mask", "mask[]", "control_image"])
def test_an_input_image_may_be_larger_text(name: str) -> None:
    assert read_parts(part(name, b"a" * 2_000_000) + END)


def test_a_part_may_have_headers_of_1024_bytes() -> None:
    assert read_parts(part("prompt", more=b"; x=" + b"a" * 900) + image(b"x"))["prompt"] == "x"
    with pytest.raises(InvalidRequestError, match="1,024 bytes"):
        read_parts(part("prompt", more=b"; x=" + b"a" * 1000) + image(b"x"))


@pytest.mark.parametrize("in_json", [True, False])
def test_an_object_in_a_form_may_have_64_entries(in_json: bool) -> None:
    def edit(count: int) -> None:
        loras = {f"lora{number}": 1.0 for number in range(count)}
        text = (
            [("loras", (None, json.dumps(loras)))]
            if in_json
            else [(f"loras[{name}]", (None, str(weight))) for name, weight in loras.items()]
        )
        body = form_of([("image", ("a", INPUT_IMAGE)), ("prompt", (None, "a")), *text])
        openai_edits.to_edit(body, FULL_MODEL_INFO, SETTINGS, "id")

    for count, message in ((64, "must name a LoRA"), (65, "may have at most 64 entries")):
        with pytest.raises(InvalidRequestError, match=message) as raised:
            edit(count)
        assert raised.value.param == "loras"


names = st.sampled_from(
    ["image", "image[]", "image[1]", "mask", "mask[]", "n", "loras", "loras[a]", "n[b]", "x", "x[y]"]
)
texts = st.text() | st.text(string.digits + '-.eE{}:,"tru') | st.sampled_from(["", "null", "true"])


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.lists(st.tuples(names | st.text(), texts | st.binary()), max_size=8))
def test_arbitrary_parts_are_converted_or_rejected(items: list[tuple[str, str | bytes]]) -> None:
    assert refusal(lambda: _to_body(items, openai_edits.EditBody)) is None or items


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.data())
def test_arbitrary_bytes_are_parsed_or_rejected(data: st.DataObject) -> None:
    """A form in which a range is removed or replaced by arbitrary bytes."""
    form = part("prompt", b"a") + part("n", b"2") + part("loras[a]", b"1") + image(b"abc")
    start = data.draw(st.integers(0, len(form)))
    end = data.draw(st.integers(start, min(len(form), start + 30)))
    piece = data.draw(st.binary(max_size=20) | st.text('-b\r\n;="', max_size=20).map(str.encode))
    refusal(lambda: read_parts(form[:start] + piece + form[end:]))
