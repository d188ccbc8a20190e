"""Decoding of base64 input images: arbitrary text, and time and memory proportional to the size."""

from __future__ import annotations

import base64
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypergen.api.sampler_aliases import split_name
from hypergen.errors import InvalidRequestError
from hypergen.images.decoding import from_base64
from tests.support.parser_costs import growth, memory, refusal

TEXTS: dict[str, Callable[[int], bytes]] = {
    "semicolons": lambda size: b"data:".ljust(size, b";"),
    "semicolons before a comma": lambda size: b"data:".ljust(size, b";") + b",",
    "many prefixes": lambda size: b"data:;base64," * (size // 13),
    "words": lambda size: b"YWJj " * (size // 5),
    "line breaks": lambda size: b"\r\n" * (size // 2),
    "colons": lambda size: b"a:" * (size // 2),
    "padding": lambda size: b"=" * size,
    "base64": lambda size: b"A" * size,
}


def read(data: bytes) -> bytes:
    return from_base64(data.decode(), "image")


@pytest.mark.parametrize("make", TEXTS.values(), ids=TEXTS)
def test_decoding_base64_takes_time_and_memory_proportional_to_its_size(make: Callable[[int], bytes]) -> None:
    assert growth(read, make, 2_000_000) < 3
    assert memory(read, make(1_000_000)) < 6


def test_a_media_type_of_1000_letters_is_accepted_and_a_longer_one_rejected() -> None:
    assert from_base64("data:" + "a" * 1000 + ";base64,YWJj", "image") == b"abc"
    with pytest.raises(InvalidRequestError):
        from_base64("data:" + "a" * 1024 + ";base64,YWJj", "image")


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.text() | st.text("data:;base64,= \nA/+%"))
def test_arbitrary_text_is_decoded_or_rejected_with_its_param(text: str) -> None:
    error = refusal(lambda: from_base64(text, "mask"))
    assert error is None or (error.param == "mask" and "'mask'" in error.message)


@settings(derandomize=True, max_examples=20, deadline=None)
@given(st.binary())
def test_encoded_bytes_are_decoded(data: bytes) -> None:
    assert from_base64(base64.encodebytes(data).decode(), "image") == data


def test_a_sampler_name_of_megabytes_uses_no_memory() -> None:
    name = "a." * 1_000_000
    tracemalloc.start()
    assert len(split_name(name)[0]) < 200
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
