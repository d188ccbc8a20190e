"""Every tensor of a model's files is used or known to change nothing, or the model is refused with its name.

Libraries drop what they do not know, so they are not asked. A file's tensors are traced through a conversion,
as empty tensors that carry their names, and what arrives is compared with what the network needs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hypergen.errors import ModelError

_NAMED = 3  # unused tensors in a message
# Pattern of a name -> why the tensor changes nothing.
_HARMLESS = {
    r"(.+\.)?model_ema\..+": "an average of the weights, kept for training",
    r"(.+\.)?position_ids": "the numbers of the positions, always the same",
    r"(.+\.)?logit_scale": "CLIP's scale for comparing texts with images",
    r"(.+\.)?attn_mask": "the causal mask, always the same",
    r"betas|logvar|lvlb_weights|(sqrt_|log_)?(one_minus_)?alphas_cumprod(_prev)?": "a table for training",
    r"sqrt_recip\w*_alphas_cumprod|posterior_\w+|denoiser\.(log_)?sigmas|global_step": "a table for training",
    r"(first_stage_model|vae)\.loss\..+": "the loss of the VAE's training",
    r"embedding_manager\..+": "left by a training of embeddings",
    r"(.+\.)?(scale_input|input_scale|scaled_fp8|comfy_quant)": "for products in 8 bits, which are not used",
    r"cond_stage_model\.model\.text_projection": "behind the layer that is used",
    r"cond_stage_model\.model\.transformer\.resblocks\.23\..+": "behind the layer that is used",
    r"(text_encoders\.clip_l|cond_stage_model)\.transformer\.text_projection\.weight": "has no use here",
}


class TracedTensor(Tensor):
    """A tensor without values that knows the names of the file's tensors that it comes from."""

    sources: frozenset[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs or {})
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)]
        for leaf in tree_leaves(output):
            if isinstance(leaf, cls):
                leaf.sources = frozenset().union(*(tensor.sources for tensor in inputs))
        return output


def traced(header: Mapping[str, Any], names: Iterable[str]) -> dict[str, Tensor]:
    """Traced tensors in the shapes and dtypes of a safetensors header.

    Raises:
        ModelError: a tensor has a dtype that torch does not have.
    """
    tensors: dict[str, Tensor] = {}
    for name in names:
        entry = header[name]
        if entry["dtype"] not in _DTYPES:
            raise ModelError(f"The tensor '{name}' has the dtype {entry['dtype']}, which is not read.")
        tensor = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")
        tensor = tensor.as_subclass(TracedTensor)
        tensor.sources = frozenset([name])
        tensors[name] = tensor
    return tensors


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class ReadNames(dict[str, Tensor]):
    """Tensors for a conversion, which notes the one it read last."""

    last_read: str | None = None

    def __getitem__(self, name: str) -> Tensor:
        self.last_read = name
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.last_read = name
        return super().get(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        self.last_read = name
        return super().pop(name, *default)


@dataclass
class Account:
    """What a model uses of its files' tensors.

    Attributes:
        used: names of tensors.
        ignored: name of a tensor that changes nothing -> why.
        fault: the first things that do not fit, in one line; None: the model can be loaded.
    """

    used: set[str] = field(default_factory=set[str])
    ignored: dict[str, str] = field(default_factory=dict[str, str])
    fault: str | None = None


def take_account(
    header: Mapping[str, Any],
    networks: Mapping[str, tuple[nn.Module, Mapping[str, Tensor]]],
    markers: Collection[str] = (),
    harmless: Mapping[str, str] | None = None,
) -> Account:
    """Compare the tensors of a model's files with those that its networks need.

    Args:
        header: of the files, name of a tensor -> its entry.
        networks: component -> the network and the traced tensors that a conversion makes for it.
        markers: names that are no weights, and are read elsewhere.
        harmless: more patterns of names of tensors that change nothing -> why.
    """
    account, unused = Account(), list[str]()
    for network, converted in networks.values():
        expected = network.state_dict()
        arrived = {id(t): t for name, t in converted.items() if name in expected}.values()
        values = Counter[str]()
        for tensor in arrived:
            values.update(dict.fromkeys(getattr(tensor, "sources", ()), tensor.numel()))
        # Conversions that cut a tensor may drop a part of it.
        account.used |= {name for name, n in values.items() if n >= math.prod(header[name]["shape"])}
    for name in header:
        if name in account.used or name in markers:
            continue
        if (reason := _why_harmless(name, {**_HARMLESS, **(harmless or {})})) is not None:
            account.ignored[name] = reason
        else:
            unused.append(f"'{name}'")
    more = f" and {len(unused) - _NAMED} more" if len(unused) > _NAMED else ""
    faults = [f"The model does not use all of {', '.join(unused[:_NAMED])}{more}."] if unused else []
    found = (_find_fault(component, *network) for component, network in networks.items())
    faults += [fault for fault in found if fault][:1]  # a renamed tensor is both unused and missing
    account.fault = " ".join(faults) or None
    return account


def _why_harmless(name: str, harmless: Mapping[str, str]) -> str | None:
    """Why a tensor that is not used changes nothing; None: it may."""
    return next((reason for pattern, reason in harmless.items() if re.fullmatch(pattern, name)), None)


def _find_fault(component: str, network: nn.Module, converted: Mapping[str, Tensor]) -> str | None:
    expected = network.state_dict()
    for name, weight in expected.items():
        if converted.get(name) is None:
            return f"The tensor '{_name_in_file(name, converted)}' of the {component} is missing."
        found = converted[name]
        if found.shape != weight.shape:
            sources = sorted(
                getattr(found, "sources", [name]), key=lambda source: ("scale" in source, source)
            )
            return (
                f"The tensor '{sources[0]}' gives the {component} a shape of {list(found.shape)}, but its "
                f"configuration needs {list(weight.shape)}."
            )
    return None


def _name_in_file(missing: str, converted: Mapping[str, Tensor]) -> str:
    """The name that a missing tensor would have in the file, by the names of those most like it."""
    best, longest = missing, -1
    for name, tensor in converted.items():
        sources = getattr(tensor, "sources", frozenset[str]())
        if len(sources) != 1:
            continue
        (source,) = sources
        start = len(_common_start(missing, name))
        if start > longest and source.endswith(name[start:]):
            best, longest = source.removesuffix(name[start:]) + missing[start:], start
    return best


def _common_start(first: str, second: str) -> str:
    length = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
    return first[:length]
