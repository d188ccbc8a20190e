"""Chunks of prompts with textual inversions: counts, positions and names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hypergen.models.text_encoders.prompt_tokens import chunk_tokens, embeddings_of
from tests.support.random_models import bytewise_tokenizer


def _vectors(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def _chunks(prompt: str, count: int, max_chunks: int = 9) -> tuple[list[list[int]], int]:
    """Positions with vectors in each chunk, and the number of tokens."""
    embeddings = {"style": _vectors(count)}
    chunks, tokens = chunk_tokens(bytewise_tokenizer(), prompt, max_chunks, embeddings)
    assert all(len(chunk.ids) == 77 for chunk in chunks)
    return [sorted(chunk.vectors) for chunk in chunks], tokens


def test_an_embedding_counts_its_vectors_and_is_never_split() -> None:
    # A letter is a token.
    assert _chunks("style", 4) == ([[1]], 4)
    assert _chunks(f"{'a' * 71} style b", 4) == ([[72], []], 76)
    assert _chunks(f"{'a' * 72} style b", 4) == ([[], [1]], 77)
    assert _chunks("style style", 75) == ([[1], [1]], 150)
    assert _chunks(f"{'a' * 72} style b", 4, max_chunks=1) == ([[]], 72)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a style b", 1),
        ("a STYLE, b", 1),
        ("(style:1.2)", 1),
        ("embedding:style", 1),
        ("a styles b", 0),
        ("freestyle", 0),
        ("style_2", 0),
        ("style-2", 1),
    ],
)
def test_a_name_is_a_whole_word_in_any_case(prompt: str, found: int) -> None:
    positions, tokens = _chunks(prompt, 2)
    assert len(positions[0]) == found
    without = chunk_tokens(bytewise_tokenizer(), prompt, 1)[1]
    name = len("embedding:style" if "embedding" in prompt else "style")
    assert tokens == without - found * (name - 2)


def test_the_longest_name_and_the_first_source_count() -> None:
    first, second, longer = _vectors(1, seed=1), _vectors(1, seed=2), _vectors(2, seed=3)
    of_encoder = {"text_encoder": first}
    embeddings = embeddings_of(
        "text_encoder",
        4,
        [{"Style": of_encoder}, {"style": {"text_encoder": second}, "style-x": {"text_encoder": longer}}],
    )
    assert list(embeddings) == ["Style", "style-x"]
    [chunk], _ = chunk_tokens(bytewise_tokenizer(), "style style-x", 1, embeddings)
    assert {position: vectors is first for position, vectors in chunk.vectors.items()} == {1: True, 2: False}
