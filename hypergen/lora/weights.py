"""LoRA weights: from a downloaded file to checked factors per layer of a loaded pipeline.

Every tensor of a file is applied, changes nothing, or is the reason why the file is refused. Nothing here
changes the pipeline: an incompatible file is an error before anything is applied.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hypergen.lora.factors import Factors, IncompatibleLoraError, Parts, Scale, read_factors
from hypergen.lora.files import check_base_model, read_file, read_safetensors
from hypergen.lora.layer_names import NORMS, LayerNames, Target
from hypergen.lora.peft_config import PeftConfig, read_header, read_json
from hypergen.lora.textual_inversion import Embeddings, check_embedding, is_of_output
from hypergen.model_store.lora_files import peft_config_file
from hypergen.model_store.lora_layout import is_peft, parse_embedding, parse_name

logger = logging.getLogger(__name__)

# Parts that change nothing if they are zeros, whatever the layer.
_SUMMANDS = {"up", "diff", "diff_bias"}

_Weights = TypeVar("_Weights", "LayerWeights", "NormWeights")


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The change of one layer, which adds `up(down(x)) + bias`; `up` includes alpha.

    Attributes:
        down: shape (rank, in), or (rank, in, kh, kw) of a convolution.
        up: shape (out, rank).
        bias: shape (out,).
        magnitude: only of DoRA, shape (out,), or (in,) if `magnitude_of_inputs`; Liu et al. 2024,
            https://arxiv.org/abs/2402.09353.
        joint: on an accelerator, the memory of both factors of a product, shape
            (padded segments, rank of a segment, in * kh * kw + out), see `slots.joined`.
        segments: of `joint`, without the padding.
    """

    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None
    magnitude_of_inputs: bool = False
    bias: Tensor | None = None
    joint: Tensor | None = None
    segments: Tensor | None = None

    @classmethod
    def of_joint(cls, joint: Tensor, inputs: tuple[int, ...], segment_count: int) -> LayerWeights:
        """
        Args:
            inputs: shape of a row of `down`, (in,) or (in, kh, kw).
        """
        factors, width = joint.flatten(0, 1), math.prod(inputs)
        down, up = factors[:, :width].unflatten(1, inputs), factors[:, width:].T
        return cls(down, up, joint=joint, segments=joint[:segment_count])

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def segment_count(self) -> int:
        return 0 if self.segments is None else len(self.segments)

    @property
    def width(self) -> int:
        """Of `joint`, that of `down`: in, or in * kh * kw."""
        return self.down[0].numel()

    @property
    def is_plain(self) -> bool:
        """Whether the layer changes by the product alone. Others run row by row, and not in CUDA graphs."""
        return self.magnitude is None and self.bias is None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        every = self.down, self.up, self.magnitude, self.bias
        return tuple(tensor for tensor in every if tensor is not None)


@dataclass(frozen=True, eq=False)
class NormWeights:
    """The change of a normalization layer's weight and bias, each of shape (channels,)."""

    weight: Tensor
    bias: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.weight, self.bias


@dataclass(frozen=True)
class LoraFile:
    """The content of a LoRA file.

    Attributes:
        layers: layer name, such as "unet.mid_block.attentions.0.proj_in", -> factors.
        embeddings: bundled textual inversions.
    """

    layers: dict[str, LayerWeights] = field(default_factory=dict[str, LayerWeights])
    norms: dict[str, NormWeights] = field(default_factory=dict[str, NormWeights])
    embeddings: Embeddings = field(default_factory=dict[str, Parts])


def in_text_encoder(layer: str) -> bool:
    return layer.startswith("text_encoder")


class Lora:
    """A loaded LoRA; denoising states that use it keep it in memory.

    Args:
        memory, layout: of the factors of the denoiser, see `slots.pack`.
    """

    _numbers = itertools.count()

    def __init__(
        self, content: LoraFile, name: str = "", memory: Tensor | None = None, layout: bytes = b""
    ) -> None:
        self.layers = content.layers
        self.norms = content.norms
        self.embeddings = content.embeddings
        self.name = name
        self.memory = memory
        self.layout = layout
        self.hooked = False
        self.number = next(self._numbers)  # unique, for cache keys
        of_text = [in_text_encoder(layer) for layer in (*self.layers, *self.norms)]
        self.changes_text_encoder = bool(self.embeddings) or any(of_text)
        self.changes_denoiser = not all(of_text)
        self.is_plain = not self.norms and all(weights.is_plain for weights in self.layers.values())
        weights = *self.layers.values(), *self.norms.values()
        tensors = [tensor for layer in weights for tensor in layer.tensors]
        tensors += [tensor for vectors in self.embeddings.values() for tensor in vectors.values()]
        self.nbytes = sum(tensor.nbytes for tensor in tensors)


def read_lora(
    path: Path,
    names: LayerNames,
    families: frozenset[str],
    embedding_widths: Mapping[str, int],
    max_bytes: float,
) -> LoraFile:
    """Read a file for the pipeline of `names`.

    Args:
        families: see `check_base_model`.
        embedding_widths: see `textual_inversion.embedding_widths`.
        max_bytes: largest file, and largest size of the factors of its full, LoHa and LoKr layers.

    Raises:
        IncompatibleLoraError: the file is damaged, not a LoRA, or a LoRA for another model.
    """
    try:
        tensors, metadata = read_safetensors(path, max_bytes)
        check_base_model(metadata, families)
        config = read_header(metadata)
        if (file := peft_config_file(path)) is not None and any(map(is_peft, tensors)):
            config = read_json(read_file(file, 1e6))
        content = _read_tensors(tensors, names, config, max_bytes)
        content = replace(content, embeddings=_read_embeddings(tensors, embedding_widths))
    except IncompatibleLoraError:
        raise
    except Exception as error:  # an untrusted file may make the libraries that read it raise anything
        logger.warning("A LoRA file cannot be read.", exc_info=error)
        raise IncompatibleLoraError("is damaged, or has an unknown layout") from None
    if not (content.layers or content.norms or content.embeddings):
        raise IncompatibleLoraError("is not a LoRA for this model: it changes none of its layers")
    return content


def _read_tensors(tensors: Parts, names: LayerNames, config: PeftConfig, max_bytes: float) -> LoraFile:
    content = LoraFile()
    parts = _by_layer(tensors)
    config.check(has_magnitudes=any(part.keys() & {"magnitude", "dora_scale"} for part in parts.values()))
    factor_bytes = 0
    for name, part in parts.items():
        targets = names.find(name)
        if targets is None and not _changes_nothing(part):
            key = next(key for key in tensors if (found := parse_name(key)) and found.layer == name)
            raise _not_applied(key, "this model has no such layer")
        try:
            for target, weights in _read_layer(part, targets or (), partial(config.scale, name)):
                if isinstance(weights, NormWeights):
                    _add(content.norms, target, weights)
                else:
                    _add(content.layers, target, weights)
                    if "down" not in part:  # LoHa and LoKr are larger in memory than in their file
                        factor_bytes += weights.down.nbytes + weights.up.nbytes
        except IncompatibleLoraError as error:
            raise IncompatibleLoraError(f"{error}: '{name[:200]}'") from None
        if factor_bytes > max_bytes:
            raise IncompatibleLoraError(f"has factors of more than {max_bytes / 1e6:.0f} MB")
    return content


def _by_layer(tensors: Parts) -> dict[str, Parts]:
    """The tensors of each layer by their part, without those of bundled textual inversions."""
    parts: defaultdict[str, Parts] = defaultdict(dict)
    for key, tensor in tensors.items():
        if parse_embedding(key) is not None:
            continue
        if (found := parse_name(key)) is None:
            raise _not_applied(key, "it is no part of a LoRA")
        if found.part in parts[found.layer]:
            raise _not_applied(key, "the layer has another tensor for the same part")
        parts[found.layer][found.part] = tensor
    return parts


def _read_embeddings(tensors: Parts, widths: Mapping[str, int]) -> Embeddings:
    """The bundled textual inversions.

    Those that replace outputs of the text encoder, and all if the model takes none, are left out with a line
    in the log.
    """
    bundled: defaultdict[str, Parts] = defaultdict(dict)
    for key, tensor in tensors.items():
        if (found := parse_embedding(key)) is None:
            continue
        name, part = found
        if part in bundled[name]:
            raise _not_applied(key, "the embedding has another tensor for the same text encoder")
        bundled[name][part] = tensor
    left_out = [name for name, parts in bundled.items() if not widths or any(map(is_of_output, parts))]
    if left_out:
        logger.warning("Left out the embeddings of a LoRA: %s.", ", ".join(left_out)[:200])
    embeddings: dict[str, Mapping[str, Tensor]] = {}
    for name, parts in bundled.items():
        if name in left_out:
            continue
        try:
            embeddings[name] = check_embedding(parts, widths)
        except IncompatibleLoraError as error:
            raise IncompatibleLoraError(f"has an embedding '{name[:200]}' that {error}") from None
    return embeddings


def _read_layer(
    parts: Parts, targets: tuple[Target, ...], scale: Scale
) -> Iterator[tuple[Target, LayerWeights | NormWeights]]:
    if not targets:
        return
    if isinstance(targets[0].layer, NORMS):
        yield targets[0], _check_norm(targets[0].layer, parts)
        return
    factors = read_factors(parts, _shape(targets), scale)
    for target in targets:
        own = factors if target.rows is None else factors.rows(target.rows)
        yield target, _check_layer(target.layer, own)


def _add(content: dict[str, Any], target: Target, weights: LayerWeights | NormWeights) -> None:
    """Add a layer; a file may have it twice, by two names, if both are equal."""
    known = content.setdefault(target.name, weights)
    for part in fields(weights):
        one, other = getattr(known, part.name), getattr(weights, part.name)
        if one is not other and not (_are_tensors(one, other) and torch.equal(one, other)):
            raise IncompatibleLoraError("has two different changes of the same layer")


def _are_tensors(*values: Any) -> bool:
    return all(isinstance(value, Tensor) for value in values)


def _shape(targets: tuple[Target, ...]) -> tuple[int, ...]:
    """Shape of the weight of a file's layer, whose outputs are those of all `targets`."""
    layer: Any = targets[0].layer
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        raise IncompatibleLoraError("changes layers of an unsupported type")
    weights: list[Any] = [target.layer.weight for target in targets]
    outputs = sum(weight.shape[0] for weight in weights)
    inside = layer.weight.shape[1:]
    # A 1 x 1 convolution is a matrix product.
    return outputs, inside[0], *(() if inside[1:] == (1, 1) else inside[1:])


def _check_layer(layer: Any, factors: Factors) -> LayerWeights:
    like = layer.weight
    return _finite(
        LayerWeights(
            factors.down.to(like),
            factors.up.to(like),
            None if factors.magnitude is None else factors.magnitude.to(like),
            factors.magnitude_of_inputs,
            None if factors.bias is None else factors.bias.to(like),
        )
    )


def _check_norm(layer: Any, parts: Parts) -> NormWeights:
    if not parts.keys() <= {"diff", "diff_bias"} or layer.weight is None:
        raise IncompatibleLoraError("changes normalization layers in an unsupported way")
    zeros = torch.zeros_like(layer.weight)
    weight, bias = parts.get("diff", zeros), parts.get("diff_bias", zeros)
    if {weight.numel(), bias.numel()} != {zeros.numel()}:
        raise IncompatibleLoraError("is for another model: the shapes of its layers differ")
    return _finite(NormWeights(weight.flatten().to(zeros), bias.flatten().to(zeros)))


def _finite(weights: _Weights) -> _Weights:
    if not all(torch.isfinite(tensor).all() for tensor in weights.tensors):
        raise IncompatibleLoraError("has NaN or Inf weights")
    return weights


def _changes_nothing(parts: Parts) -> bool:
    summands = parts.keys() & _SUMMANDS
    others = parts.keys() - _SUMMANDS - {"down", "mid", "alpha"}
    return bool(summands) and not others and not any(parts[name].any() for name in summands)


def _not_applied(key: str, reason: str) -> IncompatibleLoraError:
    return IncompatibleLoraError(f"cannot be applied: '{key[:200]}': {reason}")
