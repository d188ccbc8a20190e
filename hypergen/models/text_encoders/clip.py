"""CLIP text encoders: texts of any length in chunks, and models with several encoders."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hypergen.config import EngineSettings
from hypergen.denoising.offload import device_of
from hypergen.lora.textual_inversion import Embeddings
from hypergen.models.text_encoders.prompt_cache import (
    EncodedPrompt,
    PromptCache,
    pad_with_empty_chunks,
)
from hypergen.models.text_encoders.prompt_tokens import (
    Chunk,
    chunk_tokens,
    embeddings_of,
    replace_token_embeddings,
)
from hypergen.models.text_encoders.prompt_weighting import (
    WeightedText,
    apply_token_weights,
    parse_weights,
    token_weights,
)


class ClipEncoder:
    """Encodes a text in chunks of the tokenizer's length, one call per chunk.

    The pooled embedding is that of the first chunk: models were not trained on longer texts, and for one
    chunk it is the same as in diffusers.

    Args:
        penultimate: take the penultimate hidden layer, without the final norm, as models with several
            encoders do; otherwise the last one.
        embeddings: textual inversions of the server.
        component: the encoder's name in the pipeline.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        settings: EngineSettings,
        dtype: torch.dtype,
        *,
        penultimate: bool,
        embeddings: Embeddings = MappingProxyType({}),
        component: str = "text_encoder",
    ) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._max_chunks = settings.max_prompt_chunks
        self._weighting = settings.prompt_weighting
        self._dtype = dtype
        self._penultimate = penultimate
        self._embeddings = embeddings
        self._component = component
        self._width: int = text_encoder.get_input_embeddings().embedding_dim

    def __call__(self, text: str, *, bundled: Sequence[Embeddings] = ()) -> EncodedPrompt:
        """
        Args:
            bundled: textual inversions in LoRA files, which win over the server's; the first ones first.
        """
        weighted = parse_weights(text) if self._weighting else WeightedText(text)
        chunks, tokens = chunk_tokens(
            self._tokenizer,
            weighted.text,
            self._max_chunks,
            embeddings_of(self._component, self._width, [*bundled, self._embeddings]),
        )
        outputs = [self._encode(chunk) for chunk in chunks]
        embeds = [self._token_embeds(output) for output in outputs]
        if any(weight != 1 for weight in weighted.weights):
            # Not cached: a LoRA may change the embeddings of the empty text, too.
            empty = self._token_embeds(self._encode(chunk_tokens(self._tokenizer, "", 1)[0][0]))
            weights = token_weights(weighted, chunks)
            embeds = [apply_token_weights(e, empty, w) for e, w in zip(embeds, weights, strict=True)]
        # Encoders with a projection return its output, the others the last hidden state at the end token.
        pooled = outputs[0].get("text_embeds", outputs[0].get("pooler_output"))
        return EncodedPrompt(torch.cat(embeds, dim=1).to(self._dtype), tokens, pooled.to(self._dtype))

    def _token_embeds(self, output: Any) -> Tensor:
        return output.hidden_states[-2] if self._penultimate else output[0]

    def _encode(self, chunk: Chunk) -> Any:
        ids = torch.tensor([chunk.ids], device=device_of(self._text_encoder))
        with replace_token_embeddings(self._text_encoder, chunk):
            return self._text_encoder(ids, output_hidden_states=self._penultimate)


class PooledClipEncoder:
    """Encodes the first chunk of a text into one pooled embedding of shape (1, D), for models that take token
    embeddings from another encoder.
    """

    def __init__(self, tokenizer: Any, text_encoder: Any, dtype: torch.dtype) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._dtype = dtype

    def __call__(self, text: str) -> EncodedPrompt:
        chunks, tokens = chunk_tokens(self._tokenizer, text, sys.maxsize)
        output = self._text_encoder(torch.tensor([chunks[0].ids], device=device_of(self._text_encoder)))
        return EncodedPrompt(output.pooler_output.to(self._dtype), tokens)


def max_length(encoded: Sequence[EncodedPrompt]) -> int:
    """Number of tokens of the longest of several encoded prompts."""
    return max(prompt.embeds.shape[1] for prompt in encoded)


def concat_embeds(
    encoders: Sequence[PromptCache], encoded: Sequence[EncodedPrompt], length: int
) -> torch.Tensor:
    """Concatenate the embeddings of several encoders along the features: shape (1, length, D1 + D2).

    Args:
        encoded: one per encoder; each is padded with empty chunks to `length` tokens.
    """
    columns: list[Tensor] = [
        pad_with_empty_chunks(prompt.embeds, length, encoder.get("").embeds)
        for encoder, prompt in zip(encoders, encoded, strict=True)
    ]
    return torch.cat(columns, dim=-1)
