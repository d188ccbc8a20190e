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
    """Least recently used cache of encoded prompts, by text, text-encoder LoRAs and `clip_skip`.

    The empty text without LoRAs is never evicted. An encoder gets one chunk per call, so that the bits of its
    output do not depend on a batch size.

    Args:
        encode: of a text and, for CLIP, textual inversions and a `clip_skip`, see `ClipEncoder`.
        lora_manager: of the LoRAs; None: the family has none.
    """

    def __init__(
        self, encode: Callable[..., EncodedPrompt], max_bytes: int, lora_manager: LoraManager | None = None
    ) -> None:
        self._encode = encode
        self._lora_manager = lora_manager
        self._entries: LRUCache[Hashable, EncodedPrompt] = LRUCache(max_bytes, lambda entry: entry.nbytes)
        self._clip_skip: int | None = None
        self._empty = encode("")

    def set_clip_skip(self, clip_skip: int) -> None:
        """The layer of requests that choose none."""
        self._empty = self._encode("", clip_skip=clip_skip)
        self._clip_skip = clip_skip

    def get(self, text: str, loras: Loras = (), clip_skip: int | None = None) -> EncodedPrompt:
        """
        Args:
            clip_skip: None: the model's.
        """
        loras = text_encoder_loras(loras)
        clip_skip = clip_skip or self._clip_skip
        if not (text or loras) and clip_skip == self._clip_skip:
            return self._empty
        key = text, loras_key(loras), clip_skip
        encoded = self._entries.get(key)
        count_lookup("prompt", found=encoded is not None)
        if encoded is not None:
            return encoded
        bundled = [lora.embeddings for lora, _ in loras if lora.embeddings]
        options = {"bundled": bundled, "clip_skip": clip_skip}  # which other encoders do not have
        with lora_context(self._lora_manager, [loras]):
            encoded = self._encode(text, **{name: value for name, value in options.items() if value})
        with suppress(ValueError):  # larger than the cache
            self._entries[key] = encoded
        return encoded

    def clear(self) -> None:
        """Forget all texts but the empty one."""
        self._entries.clear()


def pad_with_empty_chunks(embeds: Tensor, length: int, empty: Tensor) -> Tensor:
    """Append chunks of the empty prompt up to `length` tokens.

    Args:
        embeds: shape (1, L, D).
        length: L plus a multiple of 77.
        empty: embeddings of one empty chunk, shape (1, 77, D).
    """
    missing = (length - embeds.shape[1]) // empty.shape[1]
    return torch.cat([embeds, *[empty] * missing], dim=1) if missing else embeds
