"""The cache of encoded prompts."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass

import torch
from cachetools import LRUCache
from torch import Tensor

from hypergen.cache_lookups import count_lookup
from hypergen.lora.batched_lora import Loras
from hypergen.lora.manager import LoraManager, lora_context, loras_key, text_encoder_loras


@dataclass(frozen=True)
class EncodedPrompt:
    """The output of a text encoder for one text.

    Attributes:
        embeds: token embeddings, shape (1, L, D); L is 77 x chunks for CLIP.
        tokens: number of encoded tokens of the text, without padding.
        pooled: pooled embedding, shape (1, D), of encoders that have one.
    """

    embeds: Tensor
    tokens: int
    pooled: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.embeds.nbytes + (0 if self.pooled is None else self.pooled.nbytes)


class PromptCache:
    """Least recently used cache of encoded prompts, by text and text-encoder LoRAs.

    The empty text without LoRAs is never evicted. An encoder gets one chunk per call, so that the bits of its
    output do not depend on a batch size.

    Args:
        encode: of a text and, for CLIP, the textual inversions of its LoRAs, see `ClipEncoder`.
        lora_manager: of the LoRAs; None: the family has none.
    """

    def __init__(
        self, encode: Callable[..., EncodedPrompt], max_bytes: int, lora_manager: LoraManager | None = None
    ) -> None:
        self._encode = encode
        self._lora_manager = lora_manager
        self._entries: LRUCache[Hashable, EncodedPrompt] = LRUCache(max_bytes, lambda entry: entry.nbytes)
        self._empty = encode("")

    def get(self, text: str, loras: Loras = ()) -> EncodedPrompt:
        loras = text_encoder_loras(loras)
        if not (text or loras):
            return self._empty
        key = text, loras_key(loras)
        encoded = self._entries.get(key)
        count_lookup("prompt", found=encoded is not None)
        if encoded is not None:
            return encoded
        bundled = [lora.embeddings for lora, _ in loras if lora.embeddings]
        with lora_context(self._lora_manager, [loras]):
            encoded = self._encode(text, bundled=bundled) if bundled else self._encode(text)
        with suppress(ValueError):  # larger than the cache
            self._entries[key] = encoded
        return encoded


def pad_with_empty_chunks(embeds: Tensor, length: int, empty: Tensor) -> Tensor:
    """Append chunks of the empty prompt up to `length` tokens.

    Args:
        embeds: shape (1, L, D).
        length: L plus a multiple of 77.
        empty: embeddings of one empty chunk, shape (1, 77, D).
    """
    missing = (length - embeds.shape[1]) // empty.shape[1]
    return torch.cat([embeds, *[empty] * missing], dim=1) if missing else embeds
