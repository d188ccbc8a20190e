"""LoRA weights: from a downloaded file to checked factors per layer of a loaded pipeline.

Nothing here changes the pipeline: an incompatible file is an error before anything is applied.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from torch import Tensor, nn

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

# The key of the file's header under which diffusers stores the LoRA's configuration.
_CONFIG_KEY = "lora_adapter_metadata"
_PARTS = re.compile(r"(?P<layer>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.weight)?")
# Names of the two factors in layouts that store an `alpha` per layer.
_FACTORS = (("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora.down", "lora.up"))


class IncompatibleLoraError(Exception):
    """A file is not a LoRA for this model. The message is for the client."""


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The factors of one layer, which adds `up(down(x))`; `up` includes alpha.

    Attributes:
        down: shape (rank, in), or (rank, in, kh, kw) of a convolution.
        up: shape (out, rank).
        magnitude: only of DoRA, shape (out,); Liu et al. 2024, https://arxiv.org/abs/2402.09353.
    """

    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def is_plain(self) -> bool:
        """Whether the layer changes by the product alone. Others run row by row, and not in CUDA graphs."""
        return self.magnitude is None

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes


class Lora:
    """A loaded LoRA; denoising states that use it keep it in memory.

    Args:
        memory, layout: of the factors of the denoiser, see `slots.pack`.
    """

    _numbers = itertools.count()

    def __init__(
        self,
        layers: dict[str, LayerWeights],
        name: str = "",
        memory: Tensor | None = None,
        layout: bytes = b"",
    ) -> None:
        self.layers = layers
        self.name = name
        self.memory = memory
        self.layout = layout
        self.hooked = False
        self.number = next(self._numbers)  # unique, for cache keys
        in_text_encoder = [layer.startswith("text_encoder") for layer in layers]
        self.changes_text_encoder, self.changes_denoiser = any(in_text_encoder), not all(in_text_encoder)
        self.nbytes = sum(weights.nbytes for weights in layers.values())


def read_weights(path: Path, pipeline: Any, max_bytes: float) -> dict[str, LayerWeights]:
    """Layer name, such as "unet.mid_block.attentions.0.proj_in", -> factors.

    Raises:
        IncompatibleLoraError: the file is damaged, not a LoRA, or a LoRA for another model.
    """
    data = _read_file(path, max_bytes)
    try:
        state_dict = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        config = json.loads(header.get(_CONFIG_KEY) or "{}")
        _fold_alphas(state_dict)
        state_dict = _convert(state_dict, pipeline)
        weights = dict(_read_layers(state_dict, config, pipeline))
    except IncompatibleLoraError:
        raise
    except Exception as error:  # an untrusted file may make the libraries that read it raise anything
        logger.warning("A LoRA file cannot be read.", exc_info=error)
        raise IncompatibleLoraError("is damaged, or has an unknown layout") from None
    if not weights:
        raise IncompatibleLoraError("is not a LoRA for this model")
    return weights


def _read_file(path: Path, max_bytes: float) -> bytes:
    """Read a file after checks on the same descriptor, so that it cannot be exchanged in between."""
    try:
        descriptor = os.open(path.resolve(strict=True), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, RuntimeError):
        raise IncompatibleLoraError("cannot be read") from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise IncompatibleLoraError("cannot be read")
        if status.st_size > max_bytes:
            raise IncompatibleLoraError(f"is larger than {max_bytes / 1e6:.0f} MB")
        return file.read()


def _fold_alphas(state_dict: StateDict) -> None:
    """Multiply alpha / rank into the up factors. Alphas that converters need stay, as alpha = rank."""
    if any("dora_scale" in key for key in state_dict):
        raise IncompatibleLoraError("is a DoRA in Kohya's layout; DoRA is supported in PEFT's layout only")
    for key in [key for key in state_dict if key.endswith(".alpha")]:
        name = key.removesuffix(".alpha")
        for down, up in _FACTORS:
            if f"{name}.{down}.weight" in state_dict:
                rank = state_dict[f"{name}.{down}.weight"].shape[0]
                alpha = float(state_dict.pop(key))
                factor = state_dict[f"{name}.{up}.weight"].to(torch.float32)
                state_dict[f"{name}.{up}.weight"] = factor * (alpha / rank)
                if down == "lora_down":
                    state_dict[key] = torch.tensor(float(rank))


def _convert(state_dict: StateDict, pipeline: Any) -> StateDict:
    """Convert to the names of diffusers and PEFT: component, layer, `lora_A` or `lora_B`."""
    # SDXL's files may number blocks as the original code does; diffusers maps them by the UNet's config.
    sdxl = hasattr(pipeline, "unet") and hasattr(pipeline, "text_encoder_2")
    options: dict[str, Any] = {"unet_config": pipeline.unet.config} if sdxl else {}
    converted = pipeline.lora_state_dict(state_dict, use_safetensors=True, **options)
    return converted[0] if isinstance(converted, tuple) else converted


def _read_layers(
    state_dict: StateDict, config: dict[str, Any], pipeline: Any
) -> Iterator[tuple[str, LayerWeights]]:
    unused = set(state_dict)
    for component in pipeline._lora_loadable_modules:
        prefix = f"{component}."
        part = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        if not part:
            continue
        unused -= {prefix + key for key in part}
        module = getattr(pipeline, component, None)
        if module is None:
            raise IncompatibleLoraError("is not a LoRA for this model")
        if component.startswith("text_encoder"):
            part = convert_state_dict_to_peft(convert_state_dict_to_diffusers(part))
            if not hasattr(module, "text_model"):
                part = {key.removeprefix("text_model."): value for key, value in part.items()}
        elif not any("lora_A" in key for key in part):
            part = convert_unet_state_dict_to_peft(part)
        own = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
        for name, weights in _check_layers(part, own, module):
            yield prefix + name, weights
    if unused:
        raise IncompatibleLoraError("is not a LoRA for this model")


def _check_layers(
    state_dict: StateDict, config: dict[str, Any], module: nn.Module
) -> Iterator[tuple[str, LayerWeights]]:
    """Check the factors of each layer against the layer."""
    layers = dict(module.named_modules())
    parts: defaultdict[str, StateDict] = defaultdict(dict)
    for key, tensor in state_dict.items():
        match = _PARTS.fullmatch(key)
        if match is None:
            raise IncompatibleLoraError("has weights that are not LoRA factors")
        parts[match["layer"]][match["part"]] = tensor
    for name, part in parts.items():
        layer = layers.get(name)
        if layer is None:
            raise IncompatibleLoraError("is for another model: this one does not have its layers")
        yield name, _check_layer(layer, part, _scale(config, name, part["lora_A"].shape[0]))


def _check_layer(layer: nn.Module, part: StateDict, scale: float) -> LayerWeights:
    down, up, magnitude = part["lora_A"], part["lora_B"], part.get("lora_magnitude_vector")
    if isinstance(layer, nn.Linear):
        in_features, kernel = layer.in_features, (1, 1)
    elif isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
        in_features, kernel = layer.in_channels, layer.kernel_size
    else:
        raise IncompatibleLoraError("changes layers of an unsupported type")
    rank, out_features = down.shape[0], layer.weight.shape[0]
    if (
        down.numel() != rank * in_features * kernel[0] * kernel[1]
        or up.numel() != out_features * rank
        or not rank
    ):
        raise IncompatibleLoraError("is for another model: the shapes of its layers differ")
    if down.dim() == 4 and down.shape[2:] != kernel:
        raise IncompatibleLoraError("is for another model: the shapes of its layers differ")
    like = layer.weight
    weights = LayerWeights(
        # A 1 x 1 convolution is a matrix product.
        down.reshape(rank, in_features, *(() if kernel == (1, 1) else kernel)).to(like),
        (up.reshape(out_features, rank).to(torch.float32) * scale).to(like),
        None if magnitude is None else magnitude.reshape(out_features).to(like),
    )
    tensors = [weights.down, weights.up, *([] if magnitude is None else [weights.magnitude])]
    if not all(torch.isfinite(tensor).all() for tensor in tensors if tensor is not None):
        raise IncompatibleLoraError("has NaN or Inf weights")
    return weights


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    """alpha / rank of a layer by PEFT's configuration; without one alpha is the rank."""
    alpha = config.get("lora_alpha")
    for pattern, value in config.get("alpha_pattern", {}).items():
        with suppress(re.error):
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                alpha = value
                break
    if alpha is None:
        return 1.0
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
