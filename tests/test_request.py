"""Requests and events as text, which error messages of libraries contain."""

from __future__ import annotations

import pytest

from hypergen.events import ImageFinished, Preview
from hypergen.request import InputImage

_BYTES = bytes(10**6)


@pytest.mark.parametrize(
    "value",
    [
        ImageFinished(index=0, seed=1, data=_BYTES, prompt_tokens=3, shared_forwards=0),
        Preview(index=0, number=0, data=_BYTES),
        InputImage(512, 512, _BYTES),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_text_of_an_image_does_not_contain_its_bytes(value: object) -> None:
    assert len(repr(value)) < 200
