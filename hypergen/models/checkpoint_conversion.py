"""Convert a component of a single-file checkpoint to the tensor names of diffusers and transformers.

The same code runs with the file's tensors and with traced ones, see `tensor_accounting`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from torch import Tensor, nn

from hypergen.errors import ModelError
from hypergen.model_store.checkpoint_detection import PREFIX
from hypergen.models.tensor_accounting import ReadNames

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (".scale_weight", ".weight_scale")
_RESBLOCKS = "transformer.resblocks."


def convert(
    network: nn.Module, tensors: Mapping[str, Tensor], prefix: str, dtype: torch.dtype
) -> dict[str, Any]:
    """The tensors of a network, by its own names; a tensor that the file lacks is absent or None.

    Args:
        network: without values, with the file's configuration.
        tensors: the component's tensors of the file.
        prefix: of their names; the conversions of denoisers and VAEs also take names without it.
        dtype: of weights that are multiplied by scales.

    Raises:
        ModelError: the conversion needs a tensor that is missing, or fails at one.
    """
    read = ReadNames(_apply_scales(tensors, dtype))
    try:
        converted = _convert(network, read, prefix)
    except KeyError as error:
        name = _name_in_file(str(error.args[0]), tensors, prefix)
        raise ModelError(f"The tensor '{name}' is missing.") from None
    # What conversions raise for another shape or number of tensors than they expect.
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        name = _name_in_file(read.last_read or "", tensors, prefix)
        raise ModelError(f"The tensor '{name}' cannot be converted ({error}).") from None
    return with_tied_weights(network, converted)


def _name_in_file(name: str, tensors: Mapping[str, Tensor], prefix: str) -> str:
    """A name of a conversion, which may have removed the prefix."""
    return (
        name if name.startswith(prefix) or not any(n.startswith(prefix) for n in tensors) else prefix + name
    )


def with_tied_weights(network: nn.Module, tensors: dict[str, Any]) -> dict[str, Any]:
    """Add the other name of tensors that are in the network under two names."""
    tied: Any = getattr(network, "_tied_weights_keys", None)
    for first, second in (tied if isinstance(tied, dict) else {}).items():
        for name, other in ((first, second), (second, first)):
            if name in tensors:
                tensors.setdefault(other, tensors[name])
    return tensors


def with_text_model(network: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """CLIP's tensors by the names of this version of transformers, which has `text_model.` in one class."""
    start = "text_model." if hasattr(network, "text_model") else ""
    shortened = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    return {
        name if name.startswith("text_projection.") else f"{start}{name}": tensor
        for name, tensor in shortened.items()
    }


def _convert(network: nn.Module, tensors: ReadNames, prefix: str) -> dict[str, Any]:
    expected = network.state_dict()
    shortened = {name.removeprefix(prefix): name for name in tensors}
    if 2 * sum(name in expected for name in shortened) > len(shortened):  # the network's own names
        return {short: tensors[name] for short, name in shortened.items()}
    if (mapping := _mapping(network)) is not None:
        if prefix == PREFIX:  # files of a denoiser alone may lack it
            tensors = ReadNames({f"{PREFIX}{short}": tensors[name] for short, name in shortened.items()})
        return mapping["checkpoint_mapping_fn"](checkpoint=tensors, config=dict(network.config))  # pyright: ignore
    resblock = next((name for name in tensors if _RESBLOCKS in name), None)
    if resblock is not None:
        start = resblock.partition(_RESBLOCKS)[0]
        return with_text_model(network, convert_open_clip_checkpoint(network, tensors, prefix=start))
    inside = {name.partition("transformer.")[2] or name: tensor for name, tensor in tensors.items()}
    if not type(network).__name__.startswith("CLIP"):
        return inside
    if prefix == "text_encoders.clip_l.":  # some files of Stable Diffusion 3 leave out the identity
        width: Any = network.config.hidden_size  # pyright: ignore[reportAttributeAccessIssue]
        inside.setdefault("text_projection.weight", torch.eye(width))
    return with_text_model(network, inside)


def _mapping(network: nn.Module) -> dict[str, Any] | None:
    names = [cls.__name__ for cls in type(network).__mro__]
    return next(
        (SINGLE_FILE_LOADABLE_CLASSES[name] for name in names if name in SINGLE_FILE_LOADABLE_CLASSES), None
    )


def _apply_scales(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Multiply weights in 8-bit floating point by their scales, as ComfyUI's `fp8_scaled` files mean them.

    Raises:
        ModelError: some of the weights have a scale, and another has none.
    """
    scaled = dict(tensors)
    ending = next((end for end in _SCALES if any(name.endswith(end) for name in tensors)), None)
    if ending is None:
        return scaled
    for weight_name, weight in tensors.items():
        if weight.dtype not in _FLOAT8 or weight.dim() < 2 or not weight_name.endswith(".weight"):
            continue
        name = f"{weight_name.removesuffix('.weight')}{ending}"
        if (scale := tensors.get(name)) is None:
            raise ModelError(f"The tensor '{name}' is missing.")
        per_row = (weight.shape[0], *(1,) * (weight.dim() - 1))
        if scale.numel() == 1 or tuple(scale.shape) == per_row:
            factor = scale.float() if tuple(scale.shape) == per_row else scale.float().reshape(())
            scaled[weight_name] = (weight.float() * factor).to(dtype)
            del scaled[name]
    return scaled
