"""Prompt weighting: `(word:1.3)`, `(word)` and `[word]` in a prompt, as other programs made them known.

Read from the text before it is tokenized as a whole, so that weights of 1 leave every token what it was.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hypergen.models.text_encoders.prompt_cache import EncodedPrompt

_MORE, _LESS = 1.1, 1 / 1.1
_LARGEST = 10.0  # beyond it, what the text encoder says is noise
_PIECE = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|:\s*(?P<weight>\d{1,4}(?:\.\d{0,6})?|\.\d{1,6})\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|[^\\()\[\]:]+|.",
    re.DOTALL,
)


@dataclass(frozen=True)
class WeightedText:
    """A prompt without its marks, and how much its parts count.

    Attributes:
        starts: index of each part's first character.
        weights: of the parts, 0 to 10.
    """

    text: str
    starts: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    def weight_at(self, index: int) -> float:
        """Of the character there."""
        return self.weights[bisect_right(self.starts, index) - 1]


def parse_weights(prompt: str) -> WeightedText:
    """Take the marks out of a prompt. Brackets without a partner, and escaped ones, are text."""
    pieces = list(_PIECE.finditer(prompt))
    factors = _factors(pieces)
    parts: list[tuple[str, float]] = []
    products = [1.0]
    for number, piece in enumerate(pieces):
        if (factor := factors.get(number)) is None:
            parts.append((piece["escaped"] or piece[0], products[-1]))
        elif piece[0] in "([":
            products.append(min(products[-1] * factor, _LARGEST))
        else:
            products.pop()
    starts = accumulate((len(text) for text, _ in parts[:-1]), initial=0)
    return WeightedText(
        "".join(text for text, _ in parts),
        tuple(starts),
        tuple(weight for _, weight in parts) or (1.0,),
    )


def _factors(pieces: list[re.Match[str]]) -> dict[int, float]:
    """For each bracket that has a partner, by its number among the pieces: the factor of its inside."""
    factors: dict[int, float] = {}
    opened: list[int] = []
    open_of_a_kind: Counter[str] = Counter()
    for number, piece in enumerate(pieces):
        if piece["bracket"] in ("(", "["):
            opened.append(number)
            open_of_a_kind[piece[0]] += 1
        elif piece["weight"] is not None or piece["bracket"]:
            partner = "[" if piece["bracket"] == "]" else "("
            if not open_of_a_kind[partner]:
                continue
            while pieces[opened[-1]][0] != partner:  # brackets of the other kind that were never closed
                open_of_a_kind[pieces[opened.pop()][0]] -= 1
            open_of_a_kind[partner] -= 1
            usual = _LESS if partner == "[" else _MORE
            factor = usual if piece["weight"] is None else float(piece["weight"])
            factors[opened.pop()] = factors[number] = factor
    return factors


def without_weights(encode: Callable[[str], EncodedPrompt]) -> Callable[[str], EncodedPrompt]:
    """An encoder that reads a prompt's words alone, for those that know no weights."""
    return lambda text: encode(parse_weights(text).text)


def token_weights(tokenizer: Any, prompt: WeightedText, chunks: list[list[int]]) -> Tensor:
    """The weight of every token of `chunk_tokens`, start, end and filling included, shape (chunks, 77)."""
    inside = tokenizer.model_max_length - 2
    offsets: list[tuple[int, int]] = tokenizer(
        prompt.text,
        add_special_tokens=False,
        truncation=False,
        verbose=False,
        return_offsets_mapping=True,
    ).offset_mapping
    weights = torch.ones(len(chunks), inside + 2)
    for number, (start, _) in enumerate(offsets[: inside * len(chunks)]):
        weights[number // inside, 1 + number % inside] = prompt.weight_at(start)
    return weights


def apply_token_weights(embeds: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """Move what an encoder says of each token away from, or nearer to, what it says of an empty prompt there.

    Tokens of weight 1 keep their bits.

    Args:
        embeds, empty: of one chunk, shape (1, 77, D).
        weights: shape (77,).
    """
    scale = weights.to(embeds.device)[None, :, None]
    moved = empty.float() + scale * (embeds.float() - empty.float())
    return torch.where(scale == 1, embeds, moved.to(embeds.dtype))
