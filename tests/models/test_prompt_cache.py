"""Prompts: chunks, their filling, and the cache."""

from __future__ import annotations

import torch

from hypergen.models.text_encoders.prompt_cache import EncodedPrompt, PromptCache, pad_with_empty_chunks

_BYTES = 77 * 4 * 4  # of one chunk below


class Encoder:
    """Embeddings of one chunk, all numbers the same; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, text: str) -> EncodedPrompt:
        self.asked.append(text)
        return EncodedPrompt(torch.full((1, 77, 4), float(len(text))), len(text))


def test_a_text_is_encoded_once() -> None:
    encode = Encoder()
    cache = PromptCache(encode, 10 * _BYTES)
    assert cache.get("cat") is cache.get("cat")
    assert encode.asked == ["", "cat"]


def test_the_longest_unused_texts_are_dropped_by_their_bytes() -> None:
    encode = Encoder()
    cache = PromptCache(encode, 2 * _BYTES)
    for text in ("a", "bb", "a", "ccc", "a", "bb"):
        assert cache.get(text).tokens == len(text)
    assert encode.asked == ["", "a", "bb", "ccc", "bb"]
    assert cache._bytes == 2 * _BYTES


def test_nothing_is_kept_without_room_but_the_empty_text() -> None:
    encode = Encoder()
    cache = PromptCache(encode, 0)
    for text in ("a", "a", "", ""):
        cache.get(text)
    assert encode.asked == ["", "a", "a"]
    assert cache._bytes == 0


def test_filling_appends_empty_chunks() -> None:
    text, empty = torch.ones(1, 77, 4), torch.zeros(1, 77, 4)
    filled = pad_with_empty_chunks(text, 231, empty)
    assert filled.shape == (1, 231, 4)
    assert torch.equal(filled[:, :77], text)
    assert not filled[:, 77:].any()
    assert pad_with_empty_chunks(text, 77, empty) is text
