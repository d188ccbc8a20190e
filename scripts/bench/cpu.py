"""python -m scripts.bench --cpu: a forward pass of SD 1.5's UNet by diffusers, the engine and OpenVINO."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from hypergen.engine.batch_invariance.layers import make_layers_invariant, make_linears_invariant
from hypergen.engine.reordered_weights import reorder_weights
from scripts.bench.gates import Gate
from tests.support.random_models import default_device

SIDES = (256, 512)
_ROWS = 2
_ROUNDS = {256: 9, 512: 5}
_TOKENS, _WIDTH = 77, 768
# (pixels, compared with) -> largest ratio of the engine's time.
_LIMITS = {(256, "stock"): 0.75, (256, "OpenVINO"): 1.15, (512, "stock"): 1.02}

_OURS = "HyperGen"
# Kind of operation -> parts of the names of torch's operators.
_KINDS = {
    "convolutions": ("conv",),
    "linear layers": ("linear", "addmm", "aten::mm"),
    "attention": ("scaled_dot_product",),
    "normalization": ("norm",),
}
_OTHER = "other"  # activations, sums, copies

# Latents, timesteps and prompt embeddings.
Inputs = tuple[Tensor, Tensor, Tensor]
Forward = Callable[[Inputs], object]


@dataclass(frozen=True)
class ForwardTimes:
    """Seconds of forward passes of 2 rows, with all cores, in rounds of one each.

    Attributes:
        shares: of the time, for each kind of operation in `_KINDS`, in one more pass; of HyperGen only.
    """

    side: int
    runtime: str
    seconds: tuple[float, ...]
    shares: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def median_s(self) -> float:
        return median(self.seconds)


def measure(unet: Mapping[str, Any], sides: tuple[int, ...] = SIDES) -> list[ForwardTimes]:
    """Measure each runtime at each size. OpenVINO is left out if it is not installed.

    Args:
        unet: configuration of the `UNet2DConditionModel`; its defaults are those of SD 1.5.
        sides: pixels.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    with default_device("cpu", torch.float32):
        stock: Any = UNet2DConditionModel(**{"cross_attention_dim": _WIDTH, **unet}).eval()
    reordered = copy.deepcopy(stock)
    times: list[ForwardTimes] = []
    with torch.inference_mode():
        reorder_weights(reordered)
        make_linears_invariant(reordered)
        for side in sides:
            inputs = _inputs(stock, side)
            one_row: Any = tuple(tensor[:1] for tensor in inputs)
            make_layers_invariant(reordered, lambda row=one_row: _run(reordered, row), _ROWS)
            forwards: dict[str, Forward] = {
                "stock": partial(_run, stock),
                _OURS: partial(_run, reordered),
            }
            if find_spec("openvino"):
                forwards["OpenVINO"] = _openvino(stock, inputs)
            shares = _shares(partial(_run, reordered), inputs)
            times += _interleaved(side, forwards, inputs, shares)
    return times


def gates_of(times: list[ForwardTimes]) -> tuple[list[Gate], list[str]]:
    """The gates, and those that were not measured."""
    seconds = {(entry.side, entry.runtime): entry.median_s for entry in times}
    gates: list[Gate] = []
    unmeasured: list[str] = []
    for (side, other), limit in _LIMITS.items():
        what = f"SD 1.5, {side}x{side}, {_ROWS} rows: seconds of a forward pass over {other}'s"
        if (side, other) in seconds:
            gates.append(Gate(what, seconds[side, _OURS] / seconds[side, other], limit, at_most=True))
        else:
            unmeasured.append(f"{what} (pip install {other.lower()})")
    return gates, unmeasured


def print_times(console: Console, times: list[ForwardTimes]) -> None:
    table = Table(title=f"Forward passes of {_ROWS} rows on all cores, float32", title_justify="left")
    for column in ("size", "runtime", "median s", "least s", "most s"):
        table.add_column(column)
    for entry in times:
        figures = (entry.median_s, min(entry.seconds), max(entry.seconds))
        size = f"{entry.side}x{entry.side}"
        table.add_row(size, entry.runtime, *(f"{figure:.3f}" for figure in figures))
    console.print(table)
    table = Table(title="Where HyperGen's time goes", title_justify="left")
    for column in ("size", *_KINDS, _OTHER):
        table.add_column(column)
    for entry in times:
        if entry.shares:
            size = f"{entry.side}x{entry.side}"
            table.add_row(size, *(f"{entry.shares[kind]:.0%}" for kind in (*_KINDS, _OTHER)))
    console.print(table)


def _shares(forward: Forward, inputs: Inputs) -> dict[str, float]:
    """The share of each kind of operation in the time of a forward pass."""
    forward(inputs)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        forward(inputs)
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(times.values())
    shares = {
        kind: sum(time for name, time in times.items() if any(part in name for part in parts)) / total
        for kind, parts in _KINDS.items()
    }
    return {**shares, _OTHER: 1 - sum(shares.values())}


def _inputs(unet: nn.Module, side: int) -> Inputs:
    generator = torch.Generator().manual_seed(side)
    channels: int = unet.config.in_channels  # type: ignore[union-attr]
    width: int = unet.config.cross_attention_dim  # type: ignore[union-attr]
    latents = torch.randn((_ROWS, channels, side // 8, side // 8), generator=generator)
    return latents, torch.full((_ROWS,), 500), torch.randn((_ROWS, _TOKENS, width), generator=generator)


def _run(unet: Any, inputs: Inputs) -> Tensor:
    return unet(*inputs, return_dict=False)[0]


class _Traced(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self._unet = unet

    def forward(self, latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        return _run(self._unet, (latents, timesteps, embeds))


def _openvino(unet: nn.Module, inputs: Inputs) -> Forward:
    import openvino  # pyright: ignore[reportMissingImports]  only for this benchmark

    shapes = [list(tensor.shape) for tensor in inputs]
    model = openvino.convert_model(_Traced(unet), example_input=inputs, input=shapes)
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(model, "CPU", options)
    return lambda given: compiled([tensor.numpy() for tensor in given])


def _interleaved(
    side: int, forwards: Mapping[str, Forward], inputs: Inputs, shares: dict[str, float]
) -> list[ForwardTimes]:
    """Each round runs all, in rotating order, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in forwards}
    names = list(forwards)
    for number in range(_ROUNDS.get(side, 3) + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = time.perf_counter()
            forwards[name](inputs)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return [
        ForwardTimes(side, name, tuple(values), shares if name == _OURS else {})
        for name, values in seconds.items()
    ]


def save(output: Path, environment: dict[str, Any], times: list[ForwardTimes]) -> None:
    content = {"environment": environment, "forwards": [asdict(entry) for entry in times]}
    (output / "cpu.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
