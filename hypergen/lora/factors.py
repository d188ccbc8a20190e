"""From the tensors of one layer in a LoRA file to two factors: their product is the change of its weight.

Every form is exact: LoRA, LoHa and LoKr (Yeh et al. 2023, https://arxiv.org/abs/2309.14859), each with or
without a core tensor (Tucker), and full differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Parts = dict[str, Tensor]
# From a rank to the factor of the product, alpha / rank.
Scale = Callable[[int], float]


class IncompatibleLoraError(Exception):
    """A file is not a LoRA, or a textual inversion, for this model. The message follows its name."""


@dataclass(frozen=True)
class Factors:
    """The change of one layer of a file: weight += up @ down, bias += bias.

    Attributes:
        down: shape (rank, in), or (rank, in, kh, kw) of a convolution.
        up: shape (out, rank), with alpha.
        magnitude: of DoRA: norm of the changed weight of every output, or input, shape (out,) or (in,).
        magnitude_of_inputs: which of both.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    magnitude_of_inputs: bool = False

    def rows(self, rows: tuple[slice, ...]) -> Factors:
        """The change of some outputs, in the order of `rows`.

        Raises:
            IncompatibleLoraError: the norms of inputs depend on all outputs.
        """
        if self.magnitude_of_inputs:
            raise IncompatibleLoraError("is a DoRA of the inputs of a layer that this model splits")

        def select(tensor: Tensor) -> Tensor:
            return torch.cat([tensor[part] for part in rows])

        return replace(
            self,
            up=select(self.up),
            bias=None if self.bias is None else select(self.bias),
            magnitude=None if self.magnitude is None else select(self.magnitude),
        )


def read_factors(parts: Parts, shape: tuple[int, ...], scale: Scale) -> Factors:
    """Combine the parts of a layer, with the names of `lora_layout`.

    Args:
        shape: of the layer's weight in the file's model, (out, in) or (out, in, kh, kw).
        scale: alpha / rank, unless `parts` have `alpha`.

    Raises:
        IncompatibleLoraError: a part is missing, or not known in this combination, or of another shape.
    """
    parts = dict(parts)
    alpha = parts.pop("alpha", None)
    if alpha is not None:
        value = float(alpha)
        scale = lambda rank: value / rank  # noqa: E731  it replaces the argument
    bias = parts.pop("diff_bias", None)
    dora_scale, magnitude = parts.pop("dora_scale", None), parts.pop("magnitude", None)
    up_bias = parts.pop("up_bias", None)
    down, up = _combine(parts, shape, scale, has_bias=bias is not None)
    if up_bias is not None:
        bias = up_bias.float() * scale(down.shape[0]) + (0 if bias is None else bias.float())
    of_inputs = dora_scale is not None and dora_scale.dim() > 1 and dora_scale.shape[0] == 1 != shape[0]
    magnitude = magnitude if dora_scale is None else dora_scale
    outputs = {"bias": bias, "magnitude": None if of_inputs else magnitude}
    if any(tensor is not None and tensor.numel() != shape[0] for tensor in outputs.values()):
        raise _other_shape()
    if of_inputs and magnitude is not None and magnitude.numel() != shape[1]:
        raise _other_shape()
    return Factors(
        down,
        up,
        None if bias is None else bias.flatten(),
        None if magnitude is None else magnitude.flatten(),
        of_inputs,
    )


def _combine(parts: Parts, shape: tuple[int, ...], scale: Scale, *, has_bias: bool) -> tuple[Tensor, Tensor]:
    names = parts.keys()
    if {"down", "up"} <= names <= {"down", "up", "mid"}:
        return _lora(parts, shape, scale)
    if names == {"diff"}:
        return _full(_reshaped(parts["diff"], shape))
    loha = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
    if names in (loha, loha | {"hada_t1", "hada_t2"}):
        return _loha(parts, shape, scale)
    if names and all(name.startswith("lokr_") for name in names):
        return _lokr(parts, shape, scale)
    if not names and has_bias:  # zeros: the bias alone changes
        like = torch.zeros(1)
        return like.new_zeros(1, *shape[1:]), like.new_zeros(shape[0], 1)
    raise IncompatibleLoraError(
        f"has a layer with the incomplete parts {', '.join(sorted(names)) or 'alpha'}"
    )


def _lora(parts: Parts, shape: tuple[int, ...], scale: Scale) -> tuple[Tensor, Tensor]:
    down, up = parts["down"], parts["up"]
    if (mid := parts.get("mid")) is not None:
        if mid.dim() != 4 or mid.shape[:2] != (up.shape[1], down.shape[0]) or down[0].numel() != shape[1]:
            raise _other_shape()
        down = torch.einsum("rqhw,qi->rihw", mid.float(), down.flatten(1).float())
    rank = down.shape[0]
    if not rank or up.numel() != shape[0] * rank:
        raise _other_shape()
    return _reshaped(down, (rank, *shape[1:])), up.reshape(shape[0], rank).float() * scale(rank)


def _loha(parts: Parts, shape: tuple[int, ...], scale: Scale) -> tuple[Tensor, Tensor]:
    """(w1_a @ w1_b) * (w2_a @ w2_b), elementwise; the factors are row-wise Khatri-Rao products."""
    w1_a, w1_b, w2_a, w2_b = (parts[f"hada_{name}"].float() for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    factor = scale(w1_b.shape[0])
    if "hada_t1" in parts:
        first = _tucker(parts["hada_t1"], w1_a, w1_b, shape)
        second = _tucker(parts["hada_t2"], w2_a, w2_b, shape)
        return _full(_reshaped(first * second, shape) * factor)
    rank = w1_b.shape[0] * w2_b.shape[0]
    inputs = math.prod(shape[1:])
    for a, b in ((w1_a, w1_b), (w2_a, w2_b)):
        if a.shape != (shape[0], b.shape[0]) or b.shape[1:] != (inputs,):
            raise _other_shape()
    if rank >= min(shape[0], inputs):
        return _full(((w1_a @ w1_b) * (w2_a @ w2_b) * factor).reshape(shape))
    up = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1)
    down = (w1_b[:, None, :] * w2_b[None, :, :]).flatten(0, 1)
    return down.reshape(rank, *shape[1:]), up * factor


def _lokr(parts: Parts, shape: tuple[int, ...], scale: Scale) -> tuple[Tensor, Tensor]:
    """kron(w1, w2), each either full or a product; the factors are Kronecker products of theirs."""
    left = _pair(parts, "lokr_w1", None, shape)
    right = _pair(parts, "lokr_w2", parts.pop("lokr_t2", None), shape)
    if parts:
        raise IncompatibleLoraError(f"has a layer with the incomplete parts {', '.join(sorted(parts))}")
    ranks = [rank for _, _, rank in (left, right) if rank is not None]
    # LyCORIS ignores alpha if no side has a rank.
    factor = scale(ranks[0]) if ranks else 1.0
    (a1, b1, _), (a2, b2, _) = left, right
    outputs, inputs = a1.shape[0] * a2.shape[0], b1.shape[1] * math.prod(b2.shape[1:])
    if outputs != shape[0] or inputs != math.prod(shape[1:]):
        raise _other_shape()
    rank = a1.shape[1] * a2.shape[1]
    if rank >= min(shape[0], inputs):
        b2 = b2.flatten(1)
        return _full(torch.kron(a1 @ b1, a2 @ b2).reshape(shape) * factor)
    down = torch.einsum("ri,sj...->rsij...", b1, b2).reshape(rank, *shape[1:])
    return down, torch.kron(a1, a2) * factor


def _pair(
    parts: Parts, name: str, core: Tensor | None, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, int | None]:
    """Two factors of one side of LoKr, and its rank; the second factor may be that of a convolution.

    Args:
        shape: of the layer's weight.
    """
    if name in parts:
        full = parts.pop(name).float()
        if _is_larger(full.shape, shape):
            raise _other_shape()
        down, up = _full(full)
        return up, down, None
    if not {f"{name}_a", f"{name}_b"} <= parts.keys():
        raise IncompatibleLoraError(f"has a layer without {name}")
    a, b = parts.pop(f"{name}_a").float(), parts.pop(f"{name}_b").float()
    if core is not None:
        down, up = _full(_tucker(core, a, b, shape))
        return up, down, b.shape[0]
    if a.dim() != 2 or a.shape[1] != b.shape[0]:
        raise _other_shape()
    return a, b, b.shape[0]


def _tucker(core: Tensor, a: Tensor, b: Tensor, largest: tuple[int, ...]) -> Tensor:
    """A convolution's weight (out, in, kh, kw) from factors of shapes (rank, out) and (rank, in).

    Raises:
        IncompatibleLoraError: it would be larger than `largest`, as small factors of a damaged file may be.
    """
    if core.dim() != 4 or _is_larger((a.shape[1], b.shape[1], *core.shape[2:]), largest):
        raise _other_shape()
    return torch.einsum("qrhw,qo,ri->oihw", core.float(), a, b)


def _full(delta: Tensor) -> tuple[Tensor, Tensor]:
    """A full matrix as a product with an identity matrix, the smaller of both possible."""
    outputs, inputs = delta.shape[:2]
    if delta.dim() == 2 and inputs < outputs:
        return torch.eye(inputs), delta
    return delta, torch.eye(outputs)


def _is_larger(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return any(side > most for side, most in zip(shape, (*other, 1, 1), strict=False))


def _reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """To `shape`, where only sides of length 1 differ, as between linear layers and 1 x 1 convolutions."""
    if [side for side in tensor.shape if side != 1] != [side for side in shape if side != 1]:
        raise _other_shape()
    return tensor.reshape(shape)


def _other_shape() -> IncompatibleLoraError:
    return IncompatibleLoraError("is for another model: the shapes of its layers differ")
