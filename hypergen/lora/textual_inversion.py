"""Textual inversions (https://arxiv.org/abs/2208.01618): token embeddings that stand for a name in prompts.

They come from files of their own and from LoRA files.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from hypergen.config import EngineSettings
from hypergen.errors import SettingError
from hypergen.lora.factors import IncompatibleLoraError, Parts
from hypergen.lora.files import check_base_model, families_of, read_file, read_safetensors
from hypergen.model_families import PIPELINES

logger = logging.getLogger(__name__)

# Name in prompts -> text encoder of the pipeline -> token embeddings, shape (count, width).
Embeddings = Mapping[str, Mapping[str, Tensor]]

# A prompt's chunk has so many tokens, and an embedding is never split.
_MAX_VECTORS = 75
_MAX_BYTES = 64e6
# Tensor in a file -> text encoder. Those of kohya's scripts, of diffusers' training scripts, and the two of
# files for a model with one text encoder.
_ENCODERS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
    "emb_params": "text_encoder",
    "string_to_param": "text_encoder",
}
# What A1111's web UI stores with the tensor.
_NOTES = {"string_to_token", "name", "step", "sd_checkpoint", "sd_checkpoint_name"}


def embedding_widths(pipeline: Any) -> dict[str, int]:
    """Text encoder -> width of its token embeddings; empty: the model does not take textual inversions."""
    spec = PIPELINES.get(type(pipeline).__name__)
    if spec is None or "embedding" not in spec.settings:
        return {}
    encoders = {name: getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")}
    return {
        name: encoder.get_input_embeddings().embedding_dim for name, encoder in encoders.items() if encoder
    }


def load_embeddings(pipeline: Any, settings: EngineSettings) -> Embeddings:
    """The textual inversions of the server, see `read_embeddings`."""
    return read_embeddings(settings.embedding, embedding_widths(pipeline), families_of(pipeline))


def read_embeddings(
    files: Mapping[str, str], widths: Mapping[str, int], families: frozenset[str]
) -> Embeddings:
    """The textual inversions in files: name in prompts -> file.

    Args:
        widths, families: see `read_embedding`.

    Raises:
        SettingError: a file is damaged, or is not a textual inversion for this model.
    """
    found: dict[str, Mapping[str, Tensor]] = {}
    for name, file in files.items():
        try:
            found[name] = read_embedding(Path(file), widths, families)
        except IncompatibleLoraError as error:
            raise SettingError("embedding", f"'{name}' {error}.", item=name) from None
    return found


def read_embedding(path: Path, widths: Mapping[str, int], families: frozenset[str]) -> Mapping[str, Tensor]:
    """Text encoder -> token embeddings in a file.

    Args:
        widths: see `embedding_widths`.
        families: see `check_base_model`.

    Raises:
        IncompatibleLoraError: it is damaged, or is not a textual inversion for this model.
    """
    try:
        if path.suffix == ".safetensors":
            parts, metadata = read_safetensors(path, _MAX_BYTES)
            check_base_model(metadata, families)
        else:
            parts = _read_pickle(path)
    except IncompatibleLoraError:
        raise
    except Exception as error:  # an untrusted file may make the libraries that read it raise anything
        logger.warning("A textual inversion cannot be read.", exc_info=error)
        raise IncompatibleLoraError("is damaged") from None
    if len(parts) == 1:
        key, tensor = next(iter(parts.items()))
        if not is_of_output(key) and key not in _ENCODERS:  # diffusers' layout: the name in prompts
            parts = {"emb_params": tensor}
    return check_embedding(parts, widths)


def check_embedding(parts: Mapping[str, Tensor], widths: Mapping[str, int]) -> Mapping[str, Tensor]:
    """Text encoder -> token embeddings, in one tensor for each text encoder of the model.

    Raises:
        IncompatibleLoraError: a tensor cannot be used, or one is missing.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in parts.items():
        encoder = _ENCODERS.get(key)
        if encoder is None or encoder in found:
            raise IncompatibleLoraError(f"cannot be used: '{key[:200]}' is no tensor of a textual inversion")
        width = widths.get(encoder)
        if width is None:
            raise IncompatibleLoraError(f"is for another model: this one has no text encoder for '{key}'")
        found[encoder] = _check_vectors(key, tensor, width)
    if missing := widths.keys() - found.keys():
        raise IncompatibleLoraError(f"is for another model: it has nothing for the {sorted(missing)[0]}")
    if len({len(vectors) for vectors in found.values()}) > 1:
        raise IncompatibleLoraError("has different numbers of vectors for the text encoders")
    return found


def _check_vectors(key: str, tensor: Tensor, width: int) -> Tensor:
    vectors = tensor[None] if tensor.dim() == 1 else tensor
    if vectors.dim() != 2 or not 0 < len(vectors) <= _MAX_VECTORS or not vectors.is_floating_point():
        raise IncompatibleLoraError(
            f"cannot be used: '{key}' has the shape {list(tensor.shape)}, not 1 to {_MAX_VECTORS} vectors"
        )
    if vectors.shape[1] != width:
        raise IncompatibleLoraError(
            f"is for another model: '{key}' has vectors of width {vectors.shape[1]}, not {width}"
        )
    if not torch.isfinite(vectors).all():
        raise IncompatibleLoraError("has NaN or Inf values")
    return vectors.detach()


def is_of_output(key: str) -> bool:
    """Whether a tensor, of OneTrainer, replaces outputs of the text encoder and not token embeddings."""
    return key.endswith("_out")


def _read_pickle(path: Path) -> Parts:
    data = read_file(path, _MAX_BYTES)
    try:
        content: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:
        raise IncompatibleLoraError(
            "is a pickle that has more than tensors and could run code; use a .safetensors file of it"
        ) from None
    if isinstance(content, Tensor):
        return {"emb_params": content}
    parts = cast(dict[Any, Any], content) if isinstance(content, dict) else {}
    if "string_to_param" in parts:
        parts = {key: value for key, value in parts.items() if key not in _NOTES}
        if isinstance(inner := parts["string_to_param"], dict) and list(cast(dict[Any, Any], inner)) == ["*"]:
            parts["string_to_param"] = inner["*"]
    for key, value in parts.items():
        if not isinstance(value, Tensor):
            raise IncompatibleLoraError(f"cannot be used: '{str(key)[:200]}' is no tensor")
    return {str(key): value for key, value in parts.items()}
