"""Random LoRA files, each with the changes of the weights that it means: the forms of a layer's tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
# Name of the layer in the file, shape of its weight -> the file's tensors and the change of the weight.
Form = Callable[[str, tuple[int, ...]], tuple[State, Tensor]]

_generator = torch.Generator()


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator) * 0.3


def pair(down: str, up: str, *, rank: int = 4, alpha: float | None = None) -> Form:
    def build(name: str, shape: tuple[int, ...]) -> tuple[State, Tensor]:
        first, second = _noise(rank, *shape[1:]), _noise(shape[0], rank)
        state = {
            f"{name}{down}": first,
            f"{name}{up}": second.reshape(shape[0], rank, *[1] * (len(shape) - 2)),
            **({} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}),
        }
        delta = (second @ first.flatten(1)).reshape(shape)
        return state, delta * (1 if alpha is None else alpha / rank)

    return build


def peft_bias(name: str, shape: tuple[int, ...]) -> tuple[State, Tensor]:
    state, delta = PEFT(name, shape)
    return {**state, f"{name}.lora_B.bias": _noise(shape[0])}, delta


def loha(name: str, shape: tuple[int, ...]) -> tuple[State, Tensor]:
    """Alpha 2, rank 3; the rank of the product is 9, or that of the weight if it is smaller."""
    outputs, inputs = shape[0], math.prod(shape[1:])
    a, b = [(_noise(outputs, 3), _noise(3, inputs)) for _ in range(2)]
    state = {
        f"{name}.hada_w1_a": a[0],
        f"{name}.hada_w1_b": a[1],
        f"{name}.hada_w2_a": b[0],
        f"{name}.hada_w2_b": b[1],
        f"{name}.alpha": torch.tensor(2.0),
    }
    return state, ((a[0] @ a[1]) * (b[0] @ b[1])).reshape(shape) * 2 / 3


def loha_tucker(name: str, shape: tuple[int, ...]) -> tuple[State, Tensor]:
    state: State = {f"{name}.alpha": torch.tensor(2.0)}
    delta = torch.ones(shape)
    for number in (1, 2):
        core, a, b = _noise(3, 3, *shape[2:]), _noise(3, shape[0]), _noise(3, shape[1])
        state |= {
            f"{name}.hada_t{number}": core,
            f"{name}.hada_w{number}_a": a,
            f"{name}.hada_w{number}_b": b,
        }
        delta = delta * torch.einsum("ijhw,jr,ip->prhw", core, b, a)
    return state, delta * 2 / 3


def lokr(left: Literal["full", "product"], right: Literal["full", "product", "core"]) -> Form:
    def build(name: str, shape: tuple[int, ...]) -> tuple[State, Tensor]:
        sides = ((4, 2), (shape[0] // 4, shape[1] // 2, *shape[2:]))
        state: State = {f"{name}.alpha": torch.tensor(3.0)}
        full: list[Tensor] = []
        for number, how, side in ((1, left, sides[0]), (2, right, sides[1])):
            key = f"{name}.lokr_w{number}"
            if how == "full":
                full.append(_noise(*side))
                state[key] = full[-1]
            elif how == "product":
                a, b = _noise(side[0], 2), _noise(2, math.prod(side[1:]))
                full.append((a @ b).reshape(side))
                state |= {f"{key}_a": a, f"{key}_b": b}
            else:
                core, a, b = _noise(2, 2, *side[2:]), _noise(2, side[0]), _noise(2, side[1])
                full.append(torch.einsum("ijhw,ip,jr->prhw", core, a, b))
                state |= {f"{name}.lokr_t2": core, f"{key}_a": a, f"{key}_b": b}
        first, second = full[0].reshape(4, 2, *[1] * (len(shape) - 2)), full[1]
        scale = 1.0 if left == right == "full" else 3 / 2
        return state, torch.kron(first, second.contiguous()) * scale

    return build


def tucker(name: str, shape: tuple[int, ...]) -> tuple[State, Tensor]:
    down, mid, up = _noise(4, shape[1], 1, 1), _noise(4, 4, *shape[2:]), _noise(shape[0], 4, 1, 1)
    state = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_mid.weight": mid,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(2.0),
    }
    return state, torch.einsum("or,rqhw,qi->oihw", up[..., 0, 0], mid, down[..., 0, 0]) / 2


def diff(name: str, shape: tuple[int, ...]) -> tuple[State, Tensor]:
    delta = _noise(*shape)
    return {f"{name}.diff": delta}, delta


def norm(name: str, shape: tuple[int, ...]) -> tuple[State, Tensor]:
    delta = _noise(*shape)
    return {f"{name}.w_norm": delta}, delta


KOHYA = pair(".lora_down.weight", ".lora_up.weight", alpha=2.0)
PEFT = pair(".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class Layout:
    """
    Attributes:
        model: key of the test's models.
        form: of all layers, unless `forms` has another one by the file's name.
        layers: name in the file -> the served model's layers, whose outputs the file's layer concatenates;
            "swapped" after one: the halves of its outputs are exchanged.
        biases: name in the file, with its ending -> layer with a changed bias.
        config: PEFT's configuration next to the file.
        scale: of the changes by that configuration.
        header: metadata in the file.
        extra: further tensors, which change nothing.
    """

    model: str
    form: Form
    layers: dict[str, tuple[str, ...]]
    forms: dict[str, Form] = field(default_factory=dict[str, Form])
    biases: dict[str, str] = field(default_factory=dict[str, str])
    config: dict[str, Any] | None = None
    scale: Callable[[str], float] = lambda name: 1.0
    header: dict[str, str] | None = None
    extra: State = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True)
class Meaning:
    """Layer -> the changes of its weight and bias."""

    weights: State
    biases: State


def write(layout: Layout, file: Path, pipeline: Any, seed: int = 0) -> Meaning:
    """Write a random file."""
    _generator.manual_seed(seed)
    state, meaning = dict(layout.extra), Meaning({}, {})
    for name, targets in layout.layers.items():
        layers = [target for target in targets if target != "swapped"]
        shapes = [_layer(pipeline, layer).weight.shape for layer in layers]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        tensors, delta = layout.forms.get(name, layout.form)(name, shape)
        state |= tensors
        if targets[-1] == "swapped":
            delta = delta.roll(shape[0] // 2, 0)
        parts = delta.split([shape[0] for shape in shapes])
        for layer, part in zip(layers, parts, strict=True):
            meaning.weights[layer] = part * layout.scale(layer)
    for name, layer in layout.biases.items():
        bias = state.get(name, _noise(_layer(pipeline, layer).weight.shape[0]))
        state[name] = bias
        meaning.biases[layer] = bias * layout.scale(layer)
    save_file({key: value.contiguous() for key, value in state.items()}, file, layout.header)
    if layout.config is not None:
        (file.parent / "adapter_config.json").write_text(json.dumps(layout.config))
    return meaning


def merge(pipeline: Any, meaning: Meaning, weight: float) -> None:
    """Add the changes to the pipeline's weights."""
    for name, delta in meaning.weights.items():
        parameter = _layer(pipeline, name).weight
        parameter.data += weight * delta.reshape(parameter.shape)
    for name, delta in meaning.biases.items():
        layer = _layer(pipeline, name)
        if layer.bias is None:
            layer.bias = torch.nn.Parameter(torch.zeros(layer.weight.shape[0]))
        layer.bias.data += weight * delta


def _layer(pipeline: Any, name: str) -> Any:
    component, _, path = name.partition(".")
    return getattr(pipeline, component).get_submodule(path)
