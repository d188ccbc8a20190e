"""The device benchmark: operations of the published configurations, and complete runs with small models."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from hypergen.config import EngineSettings
from hypergen.engine.batch_invariance.shape_profiles import ShapeProfiles
from hypergen.errors import ConfigurationError
from scripts.bench.__main__ import main
from scripts.bench.device import MEASUREMENTS, VARIANTS, Measured, Speed, stock
from scripts.bench.figures import Figures, Run
from scripts.bench.goals import PLANS, goals, plan_for
from scripts.bench.jobs import Job
from scripts.bench.published import PUBLISHED, RANDOM_WEIGHTS
from scripts.bench.rows import measure_rows
from scripts.bench.timeline import STAGES, busy_share
from scripts.bench.traces import load_comparison
from scripts.bench.work import Work, family_of, operations_of
from tests.support.fake_cuda import fake_cuda
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


def _run(folder: Path, model: str, *options: str) -> dict[str, Any]:
    """The results of the command for one model, with its shortest measurements."""
    short = ("--steps", "2", "--jobs", "2", "--seeds", "1", "--max-batch-size", "2")
    command = ["--speeds", "--model", model, *short, "--output", str(folder), *options]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    content = json.loads((folder / f"{model}.json").read_text())
    written = (folder / f"{model}.md").read_text()
    assert written.strip() in result.output
    return {**content, "markdown": written}


def _tables(markdown: str) -> dict[str, list[list[str]]]:
    """The first column's name of each table -> its rows, as lists of cells."""
    tables: dict[str, list[list[str]]] = {}
    for block in markdown.split("\n\n"):
        if block.startswith("| "):
            header, _, *rows = [
                [cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()
            ]
            assert all(len(row) == len(header) for row in rows)
            tables[header[0]] = rows
    return tables


def _run_on_fake_cuda(folder: Path, name: str, *options: str, compiles: bool = False) -> dict[str, Any]:
    """The command on the fake GPU, where torch cannot compile or, with `compiles`, compiled code is eager."""
    model = RANDOM_WEIGHTS[name]
    # What libraries import at a first use must not see the fake device.
    pipeline = model.pipeline()
    stock(pipeline, model.side, 1, compiled=False).run([Job(0, 0, 1, 5.0)], 0)
    family_of(pipeline, model.side, make_settings())

    def compile_module(*_: Any, **__: Any) -> None:
        if not compiles:
            raise RuntimeError("This torch cannot compile.\nSecond line.")

    with pytest.MonkeyPatch.context() as patches, warnings.catch_warnings(), fake_cuda():
        # Of diffusers, which warns about itself with SDXL's VAE.
        warnings.filterwarnings("ignore", "`upcast_vae`", FutureWarning)
        patches.setattr(torch.nn.Module, "compile", compile_module)
        patches.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 10**9)
        return _run(folder, name, "--device", "cuda", *options)


_COMPILED = "tiny-flux"


@pytest.fixture(scope="module", params=["tiny-sd", _COMPILED])
def on_fake_cuda(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The whole command, for a model with two rows for an image and for one with one."""
    folder = tmp_path_factory.mktemp(request.param)
    return _run_on_fake_cuda(folder, request.param, compiles=request.param == _COMPILED)


def test_everything_is_measured_in_order_on_a_gpu(on_fake_cuda: dict[str, Any]) -> None:
    assert list(on_fake_cuda["seconds"]) == list(MEASUREMENTS)
    ways, compiled = ["stock", "default", "graphs-off", "fast"], ["compile", "stock-compiled"]
    # An error does not end the run.
    reason, is_compiled = "RuntimeError: This torch cannot compile.", on_fake_cuda["model"] == _COMPILED
    assert on_fake_cuda["left_out"] == ({} if is_compiled else dict.fromkeys(compiled, reason))
    assert [speed["way"] for speed in on_fake_cuda["speeds"]] == ways + compiled * is_compiled
    assert len(on_fake_cuda["runs"]) == 2


@pytest.mark.parametrize(
    ("model", "dtypes"),
    [
        ("tiny-sd", ("float16", "float16")),
        ("tiny-sdxl", ("float16", "float32")),
        ("tiny-flux", ("bfloat16", "bfloat16")),
    ],
)
def test_a_gpu_uses_the_dtypes_of_the_server(tmp_path: Path, model: str, dtypes: tuple[str, str]) -> None:
    content = _run_on_fake_cuda(tmp_path, model, "--minutes", "1e-9")
    assert (content["dtype"], content["vae_dtype"]) == dtypes


def test_each_way_has_its_speed_and_peak_memory(on_fake_cuda: dict[str, Any]) -> None:
    rows = 1 if on_fake_cuda["model"] == "tiny-flux" else 2
    for speed in on_fake_cuda["speeds"]:
        # Not below 1: on a busy machine the peak may be measured too low.
        assert speed["alone_of_floor"] > 0
        assert speed["batch_of_floor"] > 0
        assert rows <= speed["batch_rows"] <= 2 * rows
        assert speed["peak_gb"] == 3
    assert on_fake_cuda["speeds"][0]["batch_rows"] == 2 * rows


def test_each_row_count_has_its_bits_and_times(on_fake_cuda: dict[str, Any]) -> None:
    (shape,) = on_fake_cuda["shapes"]
    own = 1 if on_fake_cuda["model"] == "tiny-flux" else 2
    assert [entry["rows"] for entry in shape["row_counts"]] == [1, 2, 4, 8, 16]
    assert shape["bucket"] in (own, 2, 4)
    assert shape["verdict"] == "exact"
    by_rows = {entry["rows"]: entry for entry in shape["row_counts"]}
    assert by_rows[1]["equal_alone"]
    assert by_rows[shape["bucket"]]["equal_in_bucket"]
    assert by_rows[1]["images_per_s"] is None or own == 1
    for entry in shape["row_counts"]:
        # A graph is one launch, which is the clock of the fake GPU.
        assert 0 < entry["forward_s"] < entry["eager_s"]


def test_the_results_are_written_as_markdown(on_fake_cuda: dict[str, Any]) -> None:
    text, side = on_fake_cuda["markdown"], on_fake_cuda["side"]
    is_compiled = on_fake_cuda["model"] == _COMPILED
    tables = _tables(text)
    assert list(tables) == [f"{side}x{side}", "rows", "load"]
    assert [row[0] for row in tables[f"{side}x{side}"]] == [
        "diffusers",
        "HyperGen",
        "HyperGen, `--no-cuda-graphs`",
        "HyperGen, `--determinism fast`",
        *(["HyperGen, `--compile on`", "diffusers, compiled"] if is_compiled else []),
    ]
    assert [row[0] for row in tables["rows"]] == ["1", "2", "4", "8", "16"]
    assert [row[:2] for row in tables["load"]] == [["1.5", "sequential"], ["1.5", "step"]]
    assert "2 of 2 images have the same bytes as alone" in text
    reason = "- Not measured: compile: RuntimeError: This torch cannot compile.\n"
    assert (reason in text) == (not is_compiled)
    for part in ("    python -m scripts.bench", "Fake GPU", "torch 2", "diffusers 0", "UTC"):
        assert part in text


def test_rows_whose_bits_depend_on_their_number_are_found() -> None:
    family: Any = family_of(RANDOM_WEIGHTS["small"].pipeline(), 64, make_settings())
    # Not the UNet: on some CPUs its own bits depend on the number of rows.
    family.forward = lambda latents, *args, **kwargs: latents.tanh() * (1.001 if len(latents) > 4 else 1)
    shape = measure_rows(family, ShapeProfiles(family, make_settings()), 64, 2)
    assert (shape.bucket, shape.verdict) == (2, "exact")
    assert [entry.equal_alone for entry in shape.row_counts] == [True, True, True, False, False]
    assert [entry.equal_in_bucket for entry in shape.row_counts] == [True, True, True, False, False]


def test_row_counts_that_do_not_fit_in_memory_are_left_out() -> None:
    family: Any = family_of(RANDOM_WEIGHTS["small"].pipeline(), 64, make_settings())
    forward = family.forward

    def limited(latents: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(latents) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(latents, *args, **kwargs)

    family.forward = limited
    shape = measure_rows(family, ShapeProfiles(family, make_settings()), 64, 2)
    assert [entry.rows for entry in shape.row_counts] == [1, 2, 4]


def test_a_cpu_measures_what_applies_to_it_and_a_profile_on_request(tmp_path: Path) -> None:
    content = _run(tmp_path, "tiny-flux", "--profile")
    assert list(content["seconds"]) == ["stock", "default", "rows", "fast", "trace", "profile"]
    assert content["left_out"] == {}
    assert (content["dtype"], content["device_busy"]) == ("float32", None)
    assert all(speed["peak_gb"] is None for speed in content["speeds"])
    assert all(entry["eager_s"] is None for entry in content["shapes"][0]["row_counts"])
    events = json.loads((tmp_path / "tiny-flux-timeline.json").read_text())["traceEvents"]
    assert {event["name"] for event in events if event.get("cat") == "user_annotation"} >= set(STAGES)
    assert len({event.get("tid") for event in events if event.get("cat") == "cpu_op"}) >= 2


def test_one_measurement_can_be_chosen(tmp_path: Path) -> None:
    content = _run(tmp_path, "tiny-flux", "--only", "rows")
    assert list(content["seconds"]) == ["rows"]
    assert content["speeds"] == content["runs"] == []
    assert not (tmp_path / "tiny-flux-timeline.json").exists()


def test_measurements_without_time_are_listed(tmp_path: Path) -> None:
    content = _run(tmp_path, "tiny-flux", "--minutes", "1e-9")
    assert content["seconds"] == {}
    assert content["left_out"] == dict.fromkeys(
        ("stock", "default", "rows", "fast", "trace"), "the 1e-09 minutes are over"
    )


def test_job_lists_without_time_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that advances by a second whenever it is read.
    clock = SimpleNamespace(monotonic=itertools.count().__next__)
    monkeypatch.setattr("scripts.bench.on_device.time", clock)
    content = _run(tmp_path, "tiny-flux", "--only", "trace", "--seeds", "10000", "--minutes", "0.2")
    done = len({run["seed"] for run in content["runs"]})
    assert done >= 1
    assert list(content["left_out"]) == [f"{10_000 - done} of 10000 job lists of the trace"]


def test_models_too_large_for_a_cpu_are_errors() -> None:
    with pytest.raises(ConfigurationError, match="'sdxl' is for a GPU; on a CPU use 'tiny-sdxl'"):
        load_comparison("sdxl", make_settings())


def test_a_plan_follows_the_command_line_and_the_device() -> None:
    assert plan_for("flux-dev", "cuda") == PLANS["flux-dev"]
    custom = plan_for("sdxl", "cuda", steps=20, batch_size=2, only=("trace", "compile"), profile=True)
    assert (custom.steps, custom.batch_size, custom.trace_side) == (20, 2, 512)
    assert custom.measurements == ("compile", "trace", "profile")
    assert plan_for("small", "cpu", only=("compile",)).measurements == ("compile",)
    with pytest.raises(ConfigurationError, match="--only graphs-off needs --device cuda"):
        plan_for("small", "cpu", only=("graphs-off",))


def _measured(model: str, **results: Any) -> Measured:
    values = {"plan": PLANS.get(model), **results}
    return Measured(model, 1024, "float16", "float32", {}, work=Work(1e12, 2, 1, 1), **values)


def _trace_run(policy: str, factor: float) -> Run:
    figures = Figures(factor, 1 / factor, 1 / factor, 1 / factor)
    return Run("sdxl 512x512", "mixed", 1.5, 0, policy, figures, 1)


def _speed(way: str, alone_s: float, batch_images_per_s: float, rows: float) -> Speed:
    return Speed(way, alone_s, 0.5, batch_images_per_s, 0.5, rows, 1.0)


def test_goals_name_the_fastest_variant() -> None:
    runs = [_trace_run("sequential", 1), _trace_run("step", 1.5)]
    speeds = [_speed("stock", 0.5, 9, 2), _speed("compile", 1.1, 1, 2), _speed("default", 2, 1, 2)]
    gates, unmeasured = goals(_measured("sdxl", speeds=speeds, runs=runs, same_bytes=(9, 10)))
    assert gates[0].what == "sdxl: a single image of 1024x1024 in 30 steps, s (HyperGen, `--compile on`)"
    assert [(gate.measured, gate.reached) for gate in gates] == [
        (1.1, True),
        (1.5, True),  # throughput
        (1.5, False),  # p95 of short jobs
        (0.9, False),  # same bytes
    ]
    assert unmeasured == []


def test_the_batch_goal_needs_enough_rows() -> None:
    small, large = _speed("default", 1, 9, 4), _speed("fast", 1, 6, 16)
    gates, unmeasured = goals(_measured("sd15", speeds=[small, large]))
    assert [(gate.measured, gate.reached) for gate in gates] == [(6, True)]
    assert len(unmeasured) == 3
    gates, unmeasured = goals(_measured("sd15", speeds=[small]))
    assert gates == []
    assert len(unmeasured) == 4
    assert unmeasured[0] == "sd15: images/s in batches of at least 8 rows"


def test_goals_need_the_planned_steps_and_a_published_model() -> None:
    speeds = [_speed("compile", 1, 1, 8)]
    gates, unmeasured = goals(_measured("sdxl", speeds=speeds, plan=plan_for("sdxl", "cuda", steps=4)))
    assert gates == []
    assert len(unmeasured) == 4
    assert goals(_measured("tiny-sdxl", speeds=speeds, plan=PLANS["sdxl"])) == ([], [])


def test_the_busy_share_counts_overlapping_kernels_once() -> None:
    assert busy_share([(4, 5), (0, 2), (1, 3), (1.5, 2.5)]) == pytest.approx(4 / 5)
    assert busy_share([]) is None


def test_the_shortest_time_counts_all_rows_of_an_image() -> None:
    assert Work(100, rows=2, forward_flops=30, decode_flops=50).floor_s(steps=10) == 6.5


def test_variants_are_valid_engine_settings() -> None:
    for changes in VARIANTS.values():
        EngineSettings.model_validate(changes)
