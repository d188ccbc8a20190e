"""Prompts as chunks of tokens for CLIP, in which textual inversions take the place of their names."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

from hypergen.lora.textual_inversion import Embeddings

logger = logging.getLogger(__name__)

# Its id stands where a textual inversion replaces the token embedding. The largest id must stay the end
# token's: old configurations of CLIP find the end of the text by it.
_PLACEHOLDER = 0
_NONE: Mapping[str, Tensor] = MappingProxyType({})


@dataclass
class Chunk:
    """Tokens of a part of a prompt, as many as the tokenizer's length, 77 for CLIP.

    Attributes:
        ids: start token, text, end token, padding.
        starts: index in the prompt of the first character of each token of the text.
        vectors: position in `ids` -> token embeddings of a textual inversion, shape (count, D).
    """

    ids: list[int]
    starts: list[int] = field(default_factory=list[int])
    vectors: dict[int, Tensor] = field(default_factory=dict[int, Tensor])


@dataclass(frozen=True)
class _Piece:
    """A token, or a textual inversion, which is never split."""

    start: int
    ids: list[int]
    vectors: Tensor | None = None


def chunk_tokens(
    tokenizer: Any, prompt: str, max_chunks: int, embeddings: Mapping[str, Tensor] = _NONE
) -> tuple[list[Chunk], int]:
    """The chunks of a prompt, at least one, and the number of tokens of the prompt in them.

    A textual inversion that does not fit into the rest of a chunk begins the next one. A longer prompt is
    truncated with a warning.

    Args:
        embeddings: name in the prompt -> token embeddings, shape (count, D); see `embeddings_of`.
    """
    room = tokenizer.model_max_length - 2
    chunks = [Chunk([])]
    for piece in _pieces(tokenizer, prompt, embeddings):
        if len(chunks[-1].ids) + len(piece.ids) > room:
            chunks.append(Chunk([]))
        chunk = chunks[-1]
        if piece.vectors is not None:
            chunk.vectors[1 + len(chunk.ids)] = piece.vectors
        chunk.ids += piece.ids
        chunk.starts += [piece.start] * len(piece.ids)
    kept = chunks[:max_chunks]
    tokens = sum(len(chunk.ids) for chunk in kept)
    if len(kept) < len(chunks):
        logger.warning(
            "Truncated a prompt from %d to %d tokens (--max-prompt-chunks).",
            sum(len(chunk.ids) for chunk in chunks),
            tokens,
        )
    for chunk in kept:
        padding = [tokenizer.pad_token_id] * (room - len(chunk.ids))
        chunk.ids = [tokenizer.bos_token_id, *chunk.ids, tokenizer.eos_token_id, *padding]
    return kept, tokens


def embeddings_of(component: str, width: int, sources: Sequence[Embeddings]) -> dict[str, Tensor]:
    """The textual inversions of a text encoder by their names; the first source with a name counts.

    Names are compared without case, as CLIP's tokenizer does.

    Args:
        width: of the token embeddings; a refiner with another text encoder does not use those of the model.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    for source in sources:
        for name, vectors in source.items():
            if vectors[component].shape[1] == width:
                found.setdefault(name.casefold(), (name, vectors[component]))
    return dict(found.values())


@contextmanager
def replace_token_embeddings(text_encoder: Any, chunk: Chunk) -> Iterator[None]:
    """Use the vectors of a chunk in the text encoder's forward pass inside."""
    if not chunk.vectors:
        yield
        return

    def replace(_module: Any, _inputs: Any, output: Tensor) -> None:
        for position, vectors in chunk.vectors.items():
            output[0, position : position + len(vectors)] = vectors.to(output)

    hook = text_encoder.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _pieces(tokenizer: Any, prompt: str, embeddings: Mapping[str, Tensor]) -> Iterator[_Piece]:
    names = tuple(embeddings)
    start = 0
    for match in _pattern(names).finditer(prompt) if names else ():
        assert match.lastindex is not None
        yield from _text_pieces(tokenizer, prompt[start : match.start()], start)
        vectors = embeddings[_longest_first(names)[match.lastindex - 1]]
        yield _Piece(match.start(), [_PLACEHOLDER] * len(vectors), vectors)
        start = match.end()
    yield from _text_pieces(tokenizer, prompt[start:], start)


def _text_pieces(tokenizer: Any, text: str, start: int) -> Iterator[_Piece]:
    encoded = tokenizer(
        text, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=True
    )
    for token, (first, _) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
        yield _Piece(start + first, [token])


@functools.lru_cache(maxsize=64)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    """Each name as a whole word, also with ComfyUI's prefix; one group per name."""
    words: list[str] = []
    for name in _longest_first(names):
        before, after = (r"\b" if letter.isalnum() or letter == "_" else "" for letter in (name[0], name[-1]))
        words.append(f"({before}{re.escape(name)}{after})")
    return re.compile(rf"(?:\bembedding:)?(?:{'|'.join(words)})", re.IGNORECASE)


def _longest_first(names: tuple[str, ...]) -> list[str]:
    """So that a name wins over another one that it starts with."""
    return sorted(names, key=len, reverse=True)
