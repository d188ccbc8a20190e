"""T5 text encoders: one fixed length for all prompts, so that prompts of any length share batches."""

from __future__ import annotations

import logging
from typing import Any

import torch

from hypergen.denoising.offload import device_of
from hypergen.models.text_encoders.prompt_cache import EncodedPrompt

logger = logging.getLogger(__name__)


class T5Encoder:
    """Encodes a text into embeddings of shape (1, `length`, D), padded as in training.

    A longer text is truncated with a warning.
    """

    def __init__(self, tokenizer: Any, text_encoder: Any, length: int, dtype: torch.dtype) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._length = length
        self._dtype = dtype

    def __call__(self, text: str) -> EncodedPrompt:
        ids: list[int] = self._tokenizer(text, truncation=False, verbose=False).input_ids
        if len(ids) > self._length:
            logger.warning("Truncated a prompt from %d to %d tokens.", len(ids) - 1, self._length - 1)
            ids = [*ids[: self._length - 1], ids[-1]]  # the last one is the end token
        padding = [self._tokenizer.pad_token_id] * (self._length - len(ids))
        embeds = self._text_encoder(torch.tensor([ids + padding], device=device_of(self._text_encoder)))[0]
        return EncodedPrompt(embeds.to(self._dtype), len(ids) - 1)
