"""What a LoRA file is, from its header, without a model and without torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypergen.errors import ModelError
from hypergen.model_families import FAMILIES
from hypergen.model_store.diffusers_layout import safetensors_header
from hypergen.model_store.lora_layout import base_model, parse_embedding, parse_name

_MAX_WORDS, _MAX_LENGTH = 10, 100  # of what a file says of itself
# Layout -> starts of its names.
_LAYOUTS = {
    "peft": ("base_model.model.",),
    "lycoris": ("lycoris_",),
    "kohya": ("lora_unet_", "lora_te"),
    "onetrainer": ("lora_transformer_",),
    "comfyui": ("diffusion_model.", "model.diffusion_model.", "text_encoders."),
}
# Method -> parts of a layer, see `lora_layout`.
_METHODS = {
    "LoRA": {"down", "up"},
    "DoRA": {"magnitude", "dora_scale"},
    "LoHa": {"hada_w1_a"},
    "LoKr": {"lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w2_a"},
    "differences": {"diff", "diff_bias"},
}
# Parts of shape (rank, inputs).
_FIRST_FACTORS = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
_TRANSFORMERS = ("transformer", "lora_transformer")
_UNET_BLOCKS = ("down_blocks", "mid_block", "up_blocks", "input_blocks", "middle_block", "output_blocks")


@dataclass(frozen=True)
class LoraSummary:
    """
    Attributes:
        model: of the metadata, else guessed from names and shapes.
        layout: of the names of layers, such as "kohya".
        methods: such as "LoRA" and "DoRA".
        layers: number of changed layers, as the file counts them.
        ranks: of the factors.
        embeddings: names of bundled textual inversions, at most ten.
        trigger_words: of the metadata, at most ten: the trigger phrase, else the most frequent tags.
    """

    model: str
    layout: str
    methods: tuple[str, ...]
    layers: int
    ranks: tuple[int, ...]
    embeddings: tuple[str, ...]
    trigger_words: tuple[str, ...]
    size_bytes: int


def summarise(path: Path) -> LoraSummary:
    """Read a file's header.

    Raises:
        ModelError: the file is damaged, or not a LoRA in a known layout.
    """
    header: dict[str, Any] = json.loads(safetensors_header(path, path.parent.name, path.name))
    given = header.pop("__metadata__", None) or {}
    metadata = {key: value for key, value in given.items() if isinstance(value, str)}
    layers: dict[str, dict[str, list[int]]] = {}
    embeddings: dict[str, None] = {}
    unknown: list[str] = []
    for key, tensor in sorted(header.items()):
        if (bundled := parse_embedding(key)) is not None:
            embeddings[bundled[0]] = None
        elif (found := parse_name(key)) is not None:
            layers.setdefault(found.layer, {})[found.part] = tensor.get("shape") or []
        else:
            unknown.append(key)
    if not layers:
        raise ModelError(f"{path.name} has no LoRA layers.")
    if unknown:
        raise ModelError(f"{path.name}: '{_shown(unknown[0])}' is no part of a LoRA in a known layout.")
    parts = {part for layer in layers.values() for part in layer}
    factors = [layer[part] for layer in layers.values() for part in _FIRST_FACTORS if layer.get(part)]
    base = base_model(metadata)
    return LoraSummary(
        model=base.family if base else _guess_model(layers),
        layout=next(
            (
                layout
                for layout, starts in _LAYOUTS.items()
                if any(name.startswith(starts) for name in layers)
            ),
            "diffusers",
        ),
        methods=tuple(method for method, marks in _METHODS.items() if marks & parts),
        layers=len(layers),
        ranks=tuple(sorted({shape[0] for shape in factors})),
        embeddings=_bounded(embeddings),
        trigger_words=_trigger_words(metadata),
        size_bytes=path.stat().st_size,
    )


def _guess_model(layers: Mapping[str, Mapping[str, list[int]]]) -> str:
    """The model family, by layer names and the width of the prompt embeddings."""
    widths = [
        layer[part][1]
        for name, layer in layers.items()
        if "attn2" in name and "to_k" in name
        for part in ("down", "hada_w1_b")
        if len(layer.get(part, ())) > 1
    ]
    width = max(widths, default=0)
    for spec in FAMILIES.values():
        if width in spec.lora_text_widths:
            return spec.lora_text_widths[width]
        if any(mark in name for mark in spec.lora_layers for name in layers):
            return spec.name
    if any(name.startswith(("unet", "lora_unet")) or _has_block(name) for name in layers):
        return " or ".join(sorted(spec.name for spec in FAMILIES.values() if spec.lora_text_widths))
    return "transformer" if any(name.startswith(_TRANSFORMERS) for name in layers) else "text encoder"


def _has_block(name: str) -> bool:
    return any(block in name for block in _UNET_BLOCKS)


def _trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """https://github.com/Stability-AI/ModelSpec, and the tags of kohya's scripts, by data set."""
    if phrase := metadata.get("modelspec.trigger_phrase"):
        return _bounded(phrase.split(","))
    counts: Counter[str] = Counter()
    with suppress(ValueError, TypeError, AttributeError):  # from anywhere
        for tags in json.loads(metadata.get("ss_tag_frequency") or "{}").values():
            counts.update(tags)
        return _bounded(tag for tag, _ in counts.most_common(_MAX_WORDS))
    return ()


def _bounded(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(filter(None, map(_shown, words)))[:_MAX_WORDS]


def _shown(text: str) -> str:
    return "".join(letter for letter in text.strip() if letter.isprintable())[:_MAX_LENGTH]
