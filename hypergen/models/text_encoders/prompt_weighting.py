"""Prompt weighting: `(word:1.3)`, `(word)` and `[word]`, the notation of AUTOMATIC1111's web UI.

The text is tokenized without its marks, so that weights of 1 do not change any token.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from hypergen.models.text_encoders.prompt_cache import EncodedPrompt
from hypergen.models.text_encoders.prompt_tokens import Chunk

_EMPHASIZE, _DEEMPHASIZE = 1.1, 1 / 1.1
_MAX_WEIGHT = 10.0  # larger weights give noise
_SYNTAX = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|:\s*(?P<weight>\d{1,4}(?:\.\d{0,6})?|\.\d{1,6})\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|[^\\()\[\]:]+|.",
    re.DOTALL,
)


@dataclass(frozen=True)
class WeightedText:
    """A prompt without its marks, and the weights of its parts.

    Attributes:
        starts: index of each part's first character.
        weights: of each part, 0 to 10.
    """

    text: str
    starts: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    def weight_at(self, index: int) -> float:
        """The weight of one character."""
        return self.weights[bisect_right(self.starts, index) - 1]


def parse_weights(prompt: str) -> WeightedText:
    """Parse the marks of a prompt. Unmatched and escaped brackets are text."""
    matches = list(_SYNTAX.finditer(prompt))
    factors = _factors(matches)
    parts: list[tuple[str, float]] = []
    products = [1.0]
    for number, match in enumerate(matches):
        if (factor := factors.get(number)) is None:
            parts.append((match["escaped"] or match[0], products[-1]))
        elif match[0] in "([":
            products.append(min(products[-1] * factor, _MAX_WEIGHT))
        else:
            products.pop()
    starts = accumulate((len(text) for text, _ in parts[:-1]), initial=0)
    return WeightedText(
        "".join(text for text, _ in parts),
        tuple(starts),
        tuple(weight for _, weight in parts) or (1.0,),
    )


def _factors(matches: list[re.Match[str]]) -> dict[int, float]:
    """Index of each matched bracket -> factor of the text inside."""
    factors: dict[int, float] = {}
    opened: list[int] = []
    open_count: Counter[str] = Counter()
    for number, match in enumerate(matches):
        if match["bracket"] in ("(", "["):
            opened.append(number)
            open_count[match[0]] += 1
        elif match["weight"] is not None or match["bracket"]:
            partner = "[" if match["bracket"] == "]" else "("
            if not open_count[partner]:
                continue
            while matches[opened[-1]][0] != partner:  # unmatched brackets of the other type
                open_count[matches[opened.pop()][0]] -= 1
            open_count[partner] -= 1
            default = _DEEMPHASIZE if partner == "[" else _EMPHASIZE
            factor = default if match["weight"] is None else float(match["weight"])
            factors[opened.pop()] = factors[number] = factor
    return factors


def without_weights(encode: Callable[[str], EncodedPrompt]) -> Callable[[str], EncodedPrompt]:
    """An encoder that ignores weights: it encodes the text without its marks."""
    return lambda text: encode(parse_weights(text).text)


def token_weights(prompt: WeightedText, chunks: Sequence[Chunk]) -> Tensor:
    """The weight of every token of the chunks, special tokens included, shape (chunks, 77)."""
    weights = torch.ones(len(chunks), len(chunks[0].ids))
    for number, chunk in enumerate(chunks):
        for position, start in enumerate(chunk.starts, 1):
            weights[number, position] = prompt.weight_at(start)
    return weights


def apply_token_weights(embeds: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """Scale the difference of each token embedding from that of the empty prompt at the same position.

    Tokens of weight 1 keep their bits.

    Args:
        embeds, empty: one chunk, shape (1, 77, D).
        weights: shape (77,).
    """
    scale = weights.to(embeds.device)[None, :, None]
    weighted = empty.float() + scale * (embeds.float() - empty.float())
    return torch.where(scale == 1, embeds, weighted.to(embeds.dtype))
