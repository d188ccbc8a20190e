"""The command line of the benchmarks: python -m scripts.bench."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

# Before torch is imported: busy-waiting threads would be measured too. And transformers would print a hint
# about torchvision.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import click
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hypergen.config import EngineSettings
from hypergen.errors import ConfigurationError, HyperGenError
from scripts.bench import cpu, gates, http, on_device, report, scheduling
from scripts.bench.alone import same_bytes_alone, single_request_ratio
from scripts.bench.device import MEASUREMENTS
from scripts.bench.figures import Run
from scripts.bench.goals import plan_for
from scripts.bench.jobs import job_list
from scripts.bench.options import NameList, NumberList, reject_unused
from scripts.bench.published import PUBLISHED, TINY
from scripts.bench.traces import GUIDANCE, MODELS, POLICIES, Comparison, load_comparison, measure

_GATED = (gates.OVERHEAD_BOUND, gates.SATURATED)
# Interleaved pairs of a diffusers call and an engine run; the saturated model takes ten times as long.
_PAIRS = {gates.OVERHEAD_BOUND: 15, gates.SATURATED: 7}
_LOADS = (0.7, 1.5, 3.0)
_BATCH = 8


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--model",
    "models",
    type=NameList((*MODELS, *TINY, *PUBLISHED)),
    help=f"one or more of {', '.join((*MODELS, *TINY))}; on cuda of {', '.join(PUBLISHED)}  "
    "[default: small; with --gates small,medium; on cuda sd15]",
)
@click.option(
    "--policy",
    "policies",
    type=NameList(POLICIES),
    default="sequential,static,step",
    show_default=True,
    help=f"one or more of {', '.join(POLICIES)}",
)
@click.option(
    "--load",
    "loads",
    type=NumberList(),
    help="arrival rate over the capacity of the sequential policy  [default: 0.7,1.5,3; with --speeds 1.5]",
)
@click.option(
    "--guidance",
    type=NameList(tuple(GUIDANCE)),
    default="mixed",
    show_default=True,
    help="mixed: three guidance scales; one: the same for all, which suits static batching",
)
@click.option("--jobs", type=click.IntRange(2), default=100, show_default=True, help="length of a job list")
@click.option("--seeds", type=click.IntRange(1), default=5, show_default=True, help="number of job lists")
@click.option(
    "--max-batch-size",
    type=click.IntRange(1),
    help="of the engine and of static batching; with --speeds also how many images are requested at once  "
    "[default: 8; for sdxl and flux-dev 1 at once]",
)
@click.option(
    "--speeds",
    "compare_speeds",
    is_flag=True,
    help="measure diffusers and the engine's settings one after another, on a wall clock; implied by cuda",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--only",
    type=NameList(MEASUREMENTS),
    help=f"with --speeds, one or more of {', '.join(MEASUREMENTS)}, which is also their order  "
    "[default: all; on a CPU those without compilation and graphs]",
)
@click.option("--steps", type=click.IntRange(1), help="with --speeds  [default: 30; for flux-dev 28]")
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    default=8,
    show_default=True,
    help="with --speeds, time for one model: a running measurement is finished, later ones are listed",
)
@click.option(
    "--profile", is_flag=True, help="with --speeds, also write a trace of torch's profiler, for Perfetto"
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="default: float32; on cuda float16 or bfloat16, as the server chooses for the model",
)
@click.option(
    "--gates",
    "check_gates",
    is_flag=True,
    help="run the measurements for the gates; status 1 if one is missed; on cuda for the model's goals",
)
@click.option(
    "--alone",
    "only_alone",
    is_flag=True,
    help="only measure single requests against diffusers",
)
@click.option(
    "--cpu",
    "cpu_forward",
    is_flag=True,
    help="only measure a forward pass of SD 1.5 on all cores of a CPU, and the choice of a batch",
)
@click.option("--http", "over_http", is_flag=True, help="only measure the overhead of HTTP")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("build/bench"),
    show_default=True,
    help="folder for JSON and plots",
)
@click.pass_context
def main(
    context: click.Context,
    models: tuple[str, ...] | None,
    policies: tuple[str, ...],
    loads: tuple[float, ...] | None,
    guidance: tuple[str, ...],
    jobs: int,
    seeds: int,
    max_batch_size: int | None,
    compare_speeds: bool,
    device: Any,
    only: tuple[str, ...] | None,
    steps: int | None,
    minutes: float,
    profile: bool,
    dtype: Any,
    check_gates: bool,
    only_alone: bool,
    cpu_forward: bool,
    over_http: bool,
    output: Path,
) -> None:
    """Compare throughput and latency of several policies on the same job lists.

    On a CPU, seconds are CPU time of one thread, so that other processes hardly matter; only ratios are
    meaningful.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("No CUDA device is available.")
    compare_speeds = compare_speeds or device == "cuda"
    reject_unused(context, speeds=compare_speeds, cuda=device == "cuda")
    if not compare_speeds:
        torch.set_num_threads(1)
    console = Console(width=max(110, Console().width))  # tables are also written to files and logs
    environment = report.environment(report.command_line())
    report.print_environment(console, environment)
    output.mkdir(parents=True, exist_ok=True)
    if cpu_forward:
        times = cpu.measure({})
        cpu.print_times(console, times)
        cpu.save(output, environment, times)
        gate_results, unmeasured = cpu.gates_of(times)
        gate_results.append(scheduling.gate())
        report.print_gates(console, gate_results)
        _exit(console, gate_results, unmeasured)
    if over_http:
        _print_and_exit(console, http.measure(console, output)[1])
    if device == "cpu":
        dtype = dtype or "float32"
    settings = EngineSettings.model_validate(
        {"device": device, "dtype": dtype, "max_batch_size": max_batch_size or _BATCH}
    )
    if compare_speeds:
        trace = on_device.Trace(loads or (1.5,), seeds, jobs)
        options = {"only": only, "profile": profile, "minutes": minutes}
        plans = {
            model: plan_for(model, device, steps=steps, batch_size=max_batch_size, **options)
            for model in models or (("sd15",) if device == "cuda" else ("small",))
        }
        unmeasured: list[str] = []
        gate_results = list[gates.Gate]()
        for model, plan in plans.items():
            measured = on_device.measure(console, output, model, settings, plan, trace)
            gate_results += measured.goals
            unmeasured += measured.unmeasured
        if check_gates:
            _exit(console, gate_results, unmeasured)
        return
    if only_alone:
        gate_results = [
            gate
            for model in models or _GATED
            for gate in _single_request_gates(load_comparison(model, settings), model)
        ]
        report.write_json(output / "alone.json", environment, [], gate_results)
        _print_and_exit(console, gate_results)
    if check_gates:
        models, guidance = models or _GATED, ("mixed",)
        seeds, jobs = max(seeds, gates.MIN_SEEDS), max(jobs, gates.MIN_JOBS)
    run_loads = loads or _LOADS
    runs: list[Run] = []
    gate_results = list[gates.Gate]()
    with _progress(console) as progress:
        for model in models or (gates.OVERHEAD_BOUND,):
            comparison = load_comparison(model, settings)
            if check_gates and model in gates.LOADS:
                run_loads, policies = gates.LOADS[model], gates.POLICIES[model]
            for guidance_mode in guidance:
                total = seeds * len(policies) * len(run_loads)
                task = progress.add_task(f"{model}, {guidance_mode} guidance", total=total)
                for run in measure(comparison, policies, run_loads, seeds, jobs, guidance_mode):
                    runs.append(run)
                    progress.advance(task)
                    report.write_json(output / "bench.json", environment, runs, gate_results)
            if check_gates:
                progress.add_task(f"{model}, alone", total=None)
                last = job_list(jobs, seeds - 1, GUIDANCE["mixed"])
                gate_results.append(gates.bytes_gate(model, *same_bytes_alone(comparison, last)))
                gate_results += _single_request_gates(comparison, model)
    report.print_runs(console, runs)
    if check_gates:
        gate_results += gates.trace_gates(runs)
    report.write_json(output / "bench.json", environment, runs, gate_results)
    for file in report.plot(output, runs):
        console.print(f"Plot: {file}", highlight=False)
    if check_gates:
        _print_and_exit(console, gate_results)


def _single_request_gates(comparison: Comparison, model: str) -> list[gates.Gate]:
    pairs = _PAIRS.get(model, min(_PAIRS.values()))
    guided, unguided = (single_request_ratio(comparison, scale, pairs) for scale in (5.0, 1.0))
    return list(gates.alone_gates(model, guided, unguided))


def _print_and_exit(console: Console, gate_results: list[gates.Gate]) -> NoReturn:
    report.print_gates(console, gate_results)
    _exit(console, gate_results)


def _exit(console: Console, gate_results: list[gates.Gate], unmeasured: Sequence[str] = ()) -> NoReturn:
    """Print the gates that are missed or not measured, and exit with status 1 if there are any."""
    missed = [gate for gate in gate_results if not gate.reached]
    for gate in missed:
        console.print(f"Missed: {gate.what}: {gate.measured:.3f}, limit {gate.shown_limit}", highlight=False)
    for part in unmeasured:
        console.print(f"Missed: {part}: not measured", highlight=False)
    sys.exit(bool(missed or unmeasured))


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


def run() -> None:
    """The entry point: HyperGen's own errors are one line and exit code 1."""
    try:
        main()
    except HyperGenError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    run()
