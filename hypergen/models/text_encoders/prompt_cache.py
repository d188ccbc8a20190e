"""Prompts: cut into the chunks that CLIP reads, encoded one by one, and remembered."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypergen.lora.batched_lora import Loras
from hypergen.lora.manager import LoraManager, lora_context, prompt_cache_key, text_encoder_loras

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedPrompt:
    """What an encoder made of one text.

    Attributes:
        embeds: shape (1, L, D); L is 77 x chunks for CLIP.
        tokens: of the text, as many as `embeds` hold.
        pooled: one embedding of the whole text, shape (1, D), from encoders that have one.
    """

    embeds: Tensor
    tokens: int
    pooled: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.embeds.nbytes + (0 if self.pooled is None else self.pooled.nbytes)


def chunk_tokens(tokenizer: Any, text: str, max_chunks: int) -> tuple[list[list[int]], int]:
    """Token ids in chunks of the tokenizer's length (77 for CLIP), each with its own start, end and filling.

    Returns the chunks, at least one, and the number of tokens of the text they hold. A longer text is cut
    off, and the log says so: the request must not fail for it.
    """
    inside = tokenizer.model_max_length - 2
    ids: list[int] = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    if len(ids) > inside * max_chunks:
        logger.warning("A prompt of %d tokens was cut off after %d.", len(ids), inside * max_chunks)
        ids = ids[: inside * max_chunks]
    chunks: list[list[int]] = []
    for start in range(0, max(len(ids), 1), inside):
        part = ids[start : start + inside]
        filling = [tokenizer.pad_token_id] * (inside - len(part))
        chunks.append([tokenizer.bos_token_id, *part, tokenizer.eos_token_id, *filling])
    return chunks, len(ids)


class PromptCache:
    """Embeddings of the latest texts, by text and the LoRAs it was encoded with, up to a number of bytes; the
    empty text without LoRAs is never dropped.

    The encoder sees one chunk per call, so that its batch size, and with it the bits of its output, never
    vary.

    Args:
        lora_manager: that loads the LoRAs of prompts; None: they have none.
    """

    def __init__(
        self, encode: Callable[[str], EncodedPrompt], max_bytes: int, lora_manager: LoraManager | None = None
    ) -> None:
        self._encode = encode
        self._lora_manager = lora_manager
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[Hashable, EncodedPrompt] = OrderedDict()
        self._empty = encode("")

    def get(self, text: str, loras: Loras = ()) -> EncodedPrompt:
        readers = text_encoder_loras(loras)
        if not (text or readers):
            return self._empty
        key = text, prompt_cache_key(readers)
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        with lora_context(self._lora_manager, [readers]):
            encoded = self._entries[key] = self._encode(text)
        self._bytes += encoded.nbytes
        while self._bytes > self._max_bytes:
            _, dropped = self._entries.popitem(last=False)
            self._bytes -= dropped.nbytes
        return encoded


def pad_with_empty_chunks(embeds: Tensor, length: int, empty: Tensor) -> Tensor:
    """Append chunks of the empty prompt until the sequence is `length` long.

    Args:
        embeds: shape (1, L, D).
        empty: embeddings of one empty chunk, shape (1, 77, D); `length` - L is a multiple of its length.
    """
    missing = (length - embeds.shape[1]) // empty.shape[1]
    return torch.cat([embeds, *[empty] * missing], dim=1) if missing else embeds
