"""The device benchmark: operations of the published configurations, and complete runs with small models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from hypergen.config import EngineSettings
from hypergen.errors import ConfigurationError
from scripts.bench.device import OURS, STOCK, VARIANTS, Plan, Speed
from scripts.bench.figures import Figures, Run
from scripts.bench.goals import PLANS, goals, plan_for, unmeasured_goals
from scripts.bench.on_device import Trace, measure
from scripts.bench.published import PUBLISHED, RANDOM_WEIGHTS
from scripts.bench.timeline import (
    DECODING,
    FILE_ENCODING,
    FORWARD,
    PREPARATION,
    PROMPT_ENCODING,
    Share,
    Span,
    shares,
)
from scripts.bench.traces import load_comparison
from scripts.bench.work import Work, family_of, operations_of
from tests.support.sync_engine import make_settings

# Weights of the published files.
_WEIGHTS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
    "flux-dev": {
        "transformer": 11_901_408_320,
        "vae": 83_819_683,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
    },
}


def _attention(layers: int, queries: int, keys: int, width: int) -> float:
    """Operations of the two matrix products of attention, in all layers."""
    return 4.0 * layers * queries * keys * width


# Twice the published 2.99 T multiply-adds of SDXL's weights, and attention layers at 64x64 and 32x32.
_SDXL = 2 * 2.99e12 + sum(
    _attention(layers, tokens, tokens + 77, width)
    for layers, tokens, width in [(10, 4096, 640), (60, 1024, 1280)]
)
# 57 blocks with 4096 image tokens and 512 text tokens: 12 matrices of 3072x3072, and attention.
_FLUX = 57 * (2.0 * 4608 * 12 * 3072**2 + _attention(1, 4608, 4608, 3072))
_OPERATIONS = {"sd15": (2, 0.803e12, 2.5e12), "sdxl": (2, _SDXL, 10.5e12), "flux-dev": (1, _FLUX, 10.5e12)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_weights_and_operations(name: str) -> None:
    pipeline = PUBLISHED[name].pipeline("meta", torch.bfloat16)
    networks = {n: c for n, c in pipeline.components.items() if isinstance(c, torch.nn.Module)}
    assert {n: sum(p.numel() for p in c.parameters()) for n, c in networks.items()} == _WEIGHTS[name]
    assert {p.dtype for c in networks.values() for p in c.parameters()} == {torch.bfloat16}
    family: Any = family_of(pipeline, PUBLISHED[name].side, make_settings())
    family.schedulers._device = torch.device("cpu")  # diffusers copies its tables to the CPU
    rows, forward_flops, decode_flops = operations_of(family, PUBLISHED[name].side)
    assert rows == _OPERATIONS[name][0]
    assert forward_flops == pytest.approx(_OPERATIONS[name][1], rel=2e-3)
    assert decode_flops == pytest.approx(_OPERATIONS[name][2], rel=0.01)


def test_operations_are_the_same_on_a_real_device() -> None:
    counts: list[tuple[int, int, int]] = []
    for device in ("meta", "cpu"):
        family: Any = family_of(RANDOM_WEIGHTS["tiny-flux"].pipeline(device), 128, make_settings())
        family.schedulers._device = torch.device("cpu")
        counts.append(operations_of(family, 128))
    assert counts[0] == counts[1]


def _measure(tmp_path: Path, name: str, *variants: str, minutes: float = 5, **changes: Any) -> dict[str, Any]:
    values = {
        "steps": 2,
        "batch_size": 2,
        "trace_side": None,
        "trace_batch": 4,
        "variants": variants,
        **changes,
    }
    trace = Trace(loads=[1.5], seeds=1, jobs=3)
    measured = measure(Console(quiet=True), tmp_path, name, make_settings(), Plan(**values), trace, minutes)
    assert measured.goals == []  # only for GPUs
    return json.loads((tmp_path / f"{name}.json").read_text())


@pytest.mark.parametrize(("name", "trace_side"), [("small", 64), ("tiny-sdxl", 128), ("tiny-flux", 64)])
def test_each_architecture_is_measured_completely(tmp_path: Path, name: str, trace_side: int) -> None:
    content = _measure(tmp_path, name, "as by default", trace_side=trace_side)
    stock, ours = content["speeds"]
    assert [stock["way"], ours["way"]] == [STOCK, OURS + "as by default"]
    assert 0 < stock["alone_of_floor"] < 1
    assert 0 < ours["alone_of_floor"] < 1
    rows = 1 if name == "tiny-flux" else 2
    assert stock["batch_rows"] == 2 * rows
    assert rows <= ours["batch_rows"] <= 2 * rows
    assert content["left_out"] == {}

    sizes = dict.fromkeys(f"{side}x{side}" for side in (RANDOM_WEIGHTS[name].side, trace_side))
    probed = [(entry["size"], entry["rows"]) for entry in content["forwards"]]
    assert probed == [(size, rows) for size in sizes for rows in (1, 2, 3, 4, 6, 8)]
    assert all(entry["serves"] == entry["exact"] for entry in content["forwards"])
    assert [run["policy"] for run in content["runs"]] == ["sequential", "step"]
    assert {run["model"] for run in content["runs"]} == {f"{name} {trace_side}x{trace_side}"}

    assert [stage["stage"] for stage in content["stages"]] == [
        PROMPT_ENCODING,
        PREPARATION,
        FORWARD,
        DECODING,
        FILE_ENCODING,
    ]
    assert all(stage["seconds"] > 0 for stage in content["stages"])
    assert content["stages"][-1]["holding_up"] == 0  # other threads encode files
    trace = json.loads((tmp_path / f"{name}-timeline.json").read_text())
    labels = {event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"}
    assert {PROMPT_ENCODING, PREPARATION, FORWARD, DECODING} <= labels
    assert len({event.get("tid") for event in trace["traceEvents"] if event.get("cat") == "cpu_op"}) >= 2
    assert (tmp_path / f"{name}-timeline.png").stat().st_size > 5_000
    assert (tmp_path / f"{name}-{trace_side}x{trace_side}-mixed.png").stat().st_size > 5_000


def test_measurements_without_time_are_listed(tmp_path: Path) -> None:
    content = _measure(tmp_path, "tiny-flux", "as by default", minutes=1e-9)
    assert content["speeds"] == []
    assert list(content["left_out"]) == [STOCK, "as by default"]
    assert "minutes are over" in content["left_out"][STOCK]


def test_a_failing_measurement_does_not_affect_the_others(tmp_path: Path) -> None:
    content = _measure(tmp_path, "tiny-flux", "as by default", trace_side=-64)
    assert [speed["way"] for speed in content["speeds"]] == [STOCK, OURS + "as by default"]
    assert list(content["left_out"]) == ["as by default"]
    assert content["runs"] == []


def test_models_too_large_for_a_cpu_are_errors() -> None:
    with pytest.raises(ConfigurationError, match="'sdxl' is for a GPU; on a CPU use 'tiny-sdxl'"):
        load_comparison("sdxl", make_settings())


def test_a_plan_follows_the_command_line_and_the_device() -> None:
    assert plan_for("flux-dev", "cuda", None, None, None) == PLANS["flux-dev"]
    custom = plan_for("sdxl", "cuda", 20, 2, ("compile",))
    assert (custom.steps, custom.batch_size, custom.trace_batch, custom.variants) == (20, 2, 2, ("compile",))
    assert custom.trace_side == 512
    on_cpu = plan_for("tiny-flux", "cpu", None, None, None).variants
    assert on_cpu[-1] == "as by default"
    assert not any("compile" in variant or "all" in variant for variant in on_cpu)


def _run(model: str, policy: str, factor: float) -> Run:
    figures = Figures(factor, 1 / factor, 1 / factor, 1 / factor)
    return Run(model, "mixed", 1.5, 0, policy, figures, 1)


def _speed(way: str, alone_s: float, batch_images_per_s: float, rows: float) -> Speed:
    return Speed(way, alone_s, 0.5, batch_images_per_s, 0.5, rows)


def test_goals_name_the_fastest_variant() -> None:
    runs = [_run("sdxl 512x512", "sequential", 1), _run("sdxl 512x512", "step", 1.5)]
    speeds = [_speed(STOCK, 0.5, 9, 2), _speed(OURS + "compile", 1.1, 1, 2), _speed(OURS + "slow", 2, 1, 2)]
    stages = [
        Share(FORWARD, 9, 9, 0, 0),
        Share(PROMPT_ENCODING, 1, 0.9, 0.1, 0.02),
        Share(DECODING, 1, 0.7, 0.3, 0.04),
    ]
    gates = {gate.what: gate for gate in goals("sdxl", PLANS["sdxl"], speeds, runs, stages)}
    single, throughput, short, holding_up = gates
    assert "1024x1024 in 30 steps" in single
    assert "(HyperGen, compile)" in single
    assert [(gate.measured, gate.reached) for gate in gates.values()] == [
        (1.1, True),
        (1.5, True),
        (1.5, False),
        (pytest.approx(0.06), False),
    ]
    assert "throughput" in throughput
    assert "short jobs" in short
    assert "hold up" in holding_up
    assert unmeasured_goals("sdxl", list(gates.values())) == []


def test_the_batch_goal_needs_enough_rows() -> None:
    small, large = _speed(OURS + "a", 1, 9, 4), _speed(OURS + "b", 1, 6, 16)
    (gate,) = goals("sd15", PLANS["sd15"], [small, large], [], [])
    assert (gate.measured, gate.reached) == (6, True)
    assert list(goals("sd15", PLANS["sd15"], [small], [], [])) == []
    assert len(unmeasured_goals("sd15", [])) == 4
    assert unmeasured_goals("sd15", [gate]) == unmeasured_goals("sd15", [])[1:]


def test_goals_need_the_planned_steps_and_a_published_model() -> None:
    speeds = [_speed(OURS + "compile", 1, 1, 8)]
    short = plan_for("sdxl", "cuda", 4, None, None)
    assert list(goals("sdxl", short, speeds, [], [])) == []
    assert list(goals("tiny-sdxl", PLANS["sdxl"], speeds, [], [])) == []


def test_only_stages_on_the_engine_thread_hold_up_forward_passes() -> None:
    spans = [
        Span(FORWARD, 0, 1, True),
        Span(PROMPT_ENCODING, 1, 1.5, True),
        Span(FORWARD, 1.5, 3, True),
        Span(FILE_ENCODING, 2, 5, False),
        Span(DECODING, 2.75, 3.25, True),
        Span(FORWARD, 4, 5, True),
        Span(DECODING, 5, 6, True),  # after the last forward pass
    ]
    by_stage = {share.stage: share for share in shares(spans)}
    assert (by_stage[PROMPT_ENCODING].holding_up_s, by_stage[PROMPT_ENCODING].holding_up) == (0.5, 0.1)
    assert (by_stage[DECODING].seconds, by_stage[DECODING].holding_up_s) == (1.5, 0.25)
    assert (by_stage[FILE_ENCODING].seconds, by_stage[FILE_ENCODING].holding_up_s) == (3, 0)
    assert by_stage[FORWARD].holding_up_s == 0


def test_the_shortest_time_counts_all_rows_of_an_image() -> None:
    assert Work(100, rows=2, forward_flops=30, decode_flops=50).floor_s(steps=10) == 6.5


def test_variants_are_valid_engine_settings() -> None:
    for changes in VARIANTS.values():
        EngineSettings.model_validate(changes)
