"""CLIP text encoders: a text of any length, chunk by chunk, and several encoders side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hypergen.config import EngineSettings
from hypergen.denoising.offload import device_of
from hypergen.models.text_encoders.prompt_cache import (
    EncodedPrompt,
    PromptCache,
    chunk_tokens,
    pad_with_empty_chunks,
)
from hypergen.models.text_encoders.prompt_weighting import (
    WeightedText,
    apply_token_weights,
    parse_weights,
    token_weights,
)


class ClipEncoder:
    """Encodes a text in chunks of the tokenizer's length; each chunk is a call of its own.

    The pooled embedding is that of the first chunk: no model was trained on anything longer, and a text that
    fits into one chunk has the one that diffusers gives it.

    Args:
        penultimate: take the last hidden layer but one, without the final norm, as models with several
            encoders do, instead of the encoder's output.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        settings: EngineSettings,
        dtype: torch.dtype,
        *,
        penultimate: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._max_chunks = settings.max_prompt_chunks
        self._weighting = settings.prompt_weighting
        self._dtype = dtype
        self._penultimate = penultimate

    def __call__(self, text: str) -> EncodedPrompt:
        weighted = parse_weights(text) if self._weighting else WeightedText(text)
        chunks, tokens = chunk_tokens(self._tokenizer, weighted.text, self._max_chunks)
        outputs = [self._encode(chunk) for chunk in chunks]
        embeds = [self._words(output) for output in outputs]
        if any(weight != 1 for weight in weighted.weights):
            # Not kept: a LoRA may change how the empty text is read, too.
            empty = self._words(self._encode(chunk_tokens(self._tokenizer, "", 1)[0][0]))
            weights = token_weights(self._tokenizer, weighted, chunks)
            embeds = [apply_token_weights(words, empty, w) for words, w in zip(embeds, weights, strict=True)]
        # Encoders with a projection give its output, the others that of the final norm at the text's end.
        pooled = outputs[0].get("text_embeds", outputs[0].get("pooler_output"))
        return EncodedPrompt(torch.cat(embeds, dim=1).to(self._dtype), tokens, pooled.to(self._dtype))

    def _words(self, output: Any) -> Tensor:
        return output.hidden_states[-2] if self._penultimate else output[0]

    def _encode(self, chunk: list[int]) -> Any:
        ids = torch.tensor([chunk], device=device_of(self._text_encoder))
        return self._text_encoder(ids, output_hidden_states=self._penultimate)


class PooledClipEncoder:
    """Encodes the first chunk of a text into one embedding of shape (1, D), for models that read the words
    with another encoder.
    """

    def __init__(self, tokenizer: Any, text_encoder: Any, dtype: torch.dtype) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._dtype = dtype

    def __call__(self, text: str) -> EncodedPrompt:
        chunks, tokens = chunk_tokens(self._tokenizer, text, sys.maxsize)
        output = self._text_encoder(torch.tensor([chunks[0]], device=device_of(self._text_encoder)))
        return EncodedPrompt(output.pooler_output.to(self._dtype), tokens)


def max_length(encoded: Sequence[EncodedPrompt]) -> int:
    """The length in tokens of the longest of several prompts."""
    return max(prompt.embeds.shape[1] for prompt in encoded)


def concat_embeds(
    encoders: Sequence[PromptCache], encoded: Sequence[EncodedPrompt], length: int
) -> torch.Tensor:
    """What several encoders made of one prompt, filled with empty chunks up to `length`: features of shape
    (1, length, D1 + D2).
    """
    columns: list[Tensor] = [
        pad_with_empty_chunks(prompt.embeds, length, encoder.get("").embeds)
        for encoder, prompt in zip(encoders, encoded, strict=True)
    ]
    return torch.cat(columns, dim=-1)
