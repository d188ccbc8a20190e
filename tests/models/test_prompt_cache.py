"""The prompt cache, and padding with empty chunks."""

from __future__ import annotations

import torch

from hypergen.models.text_encoders.prompt_cache import EncodedPrompt, PromptCache, pad_with_empty_chunks

_BYTES = 77 * 4 * 4  # of one chunk below


class Encoder:
    """Constant embeddings of one chunk; records its texts."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str) -> EncodedPrompt:
        self.texts.append(text)
        return EncodedPrompt(torch.full((1, 77, 4), float(len(text))), len(text))


def test_a_text_is_encoded_once() -> None:
    encode = Encoder()
    cache = PromptCache(encode, 10 * _BYTES)
    assert cache.get("cat") is cache.get("cat")
    assert encode.texts == ["", "cat"]


def test_the_least_recently_used_texts_are_evicted_by_bytes() -> None:
    encode = Encoder()
    cache = PromptCache(encode, 2 * _BYTES)
    for text in ("a", "bb", "a", "ccc", "a", "bb"):
        assert cache.get(text).tokens == len(text)
    assert encode.texts == ["", "a", "bb", "ccc", "bb"]
    assert cache._entries.currsize == 2 * _BYTES


def test_a_cache_of_zero_bytes_keeps_only_the_empty_text() -> None:
    encode = Encoder()
    cache = PromptCache(encode, 0)
    for text in ("a", "a", "", ""):
        cache.get(text)
    assert encode.texts == ["", "a", "a"]
    assert cache._entries.currsize == 0


def test_padding_appends_empty_chunks() -> None:
    text, empty = torch.ones(1, 77, 4), torch.zeros(1, 77, 4)
    padded = pad_with_empty_chunks(text, 231, empty)
    assert padded.shape == (1, 231, 4)
    assert torch.equal(padded[:, :77], text)
    assert not padded[:, 77:].any()
    assert pad_with_empty_chunks(text, 77, empty) is text
