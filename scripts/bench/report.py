"""The output of the benchmarks: environment, tables, JSON, plots."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hypergen import __version__, optional_packages
from scripts.bench.figures import Run, median_of, median_ratio
from scripts.bench.gates import Gate

_SHOWN = {
    "p50_s": "p50 latency",
    "p95_s": "p95 latency",
    "short_p95_s": "p95 latency of jobs of 4 and 8 steps",
}


def environment(command: Sequence[str]) -> dict[str, Any]:
    """The machine, date, versions and command of a measurement."""
    libraries = {name: metadata.version(name) for name in ("torch", "diffusers", "transformers", "pillow")}
    if torch.cuda.is_available():
        libraries |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {
        "command": " ".join(command),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "versions": {"hypergen": __version__, "python": platform.python_version(), **libraries},
    }


def _processor() -> str:
    names = Path("/proc/cpuinfo")
    lines = names.read_text(encoding="utf-8", errors="replace").splitlines() if names.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def print_environment(console: Console, environment: dict[str, Any]) -> None:
    for line in environment_lines(environment):
        console.print(line, highlight=False)


def environment_lines(environment: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return [
        f"{environment['date']}; {environment['machine']}; {environment['accelerator'] or 'no accelerator'}",
        f"{environment['threads']} threads, load average {environment['load_average']}; {versions}",
    ]


def print_runs(console: Console, runs: Sequence[Run]) -> None:
    """Print a table for each experiment: medians over the seeds, and ratios to `sequential`."""
    for experiment in dict.fromkeys(run.experiment for run in runs):
        selected = [run for run in runs if run.experiment == experiment]
        model, guidance, load = experiment
        seeds = len({run.seed for run in selected})
        table = Table(
            title=f"{model}, load {load:g}, {guidance} guidance, median of {seeds} seeds",
            title_justify="left",
        )
        columns = ("policy", "jobs/s", "p50 s", "p95 s", "short p95 s", "batch size")
        for column in columns:
            table.add_column(column, justify="left" if column == "policy" else "right")
        policies = list(dict.fromkeys(run.policy for run in selected))
        for policy in sorted(policies, key=lambda name: (name.startswith("step"), name)):
            figures = median_of(selected, policy)
            ratios = median_ratio(selected, policy, "sequential") if "sequential" in policies else None
            cells = [
                f"{value:.2f}" + (f" (x{getattr(ratios, name):.2f})" if ratios else "")
                for name, value in asdict(figures).items()
            ]
            batch_size = median_images(selected, policy)
            table.add_row(policy, *cells, f"{batch_size:.2f}")
        console.print(table)


def median_images(runs: Sequence[Run], policy: str) -> float:
    values = sorted(run.mean_batch_size for run in runs if run.policy == policy)
    return values[len(values) // 2]


def print_gates(console: Console, gates: Sequence[Gate], title: str = "Gates") -> None:
    table = Table(title=title, title_justify="left")
    for column in ("gate", "measured", "limit", ""):
        table.add_column(column)
    for gate in gates:
        verdict = "" if gate.reached else "[bold red]missed"
        table.add_row(gate.what, f"{gate.measured:.3f}", gate.shown_limit, verdict)
    console.print(table)


def write_json(file: Path, environment: dict[str, Any], runs: Sequence[Run], gates: Sequence[Gate]) -> None:
    content = {
        "environment": environment,
        "runs": [asdict(run) for run in runs],
        "gates": as_records(gates),
    }
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def as_records(gates: Sequence[Gate]) -> list[dict[str, Any]]:
    return [{**asdict(gate), "reached": gate.reached} for gate in gates]


def plot(folder: Path, runs: Sequence[Run]) -> list[Path]:
    """Plot latency against load, with a line for each policy; one file per model and guidance mode.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    files: list[Path] = []
    for model, guidance in dict.fromkeys((run.model, run.guidance) for run in runs):
        selected = [run for run in runs if (run.model, run.guidance) == (model, guidance)]
        figure = new_figure(11, 3.6)
        axes = figure.subplots(1, len(_SHOWN), sharex=True)
        for axis, (name, title) in zip(axes, _SHOWN.items(), strict=True):
            for policy in dict.fromkeys(run.policy for run in selected):
                loads = sorted({run.load for run in selected})
                values = [
                    getattr(median_of([run for run in selected if run.load == load], policy), name)
                    for load in loads
                ]
                axis.plot(loads, values, marker="o", label=policy)
            axis.set(title=title, xlabel="load (arrivals / sequential capacity)", yscale="log")
            axis.grid(True, which="both", alpha=0.3)
        axes[0].set_ylabel("seconds")
        axes[0].legend()
        figure.suptitle(f"{model} model, {guidance} guidance")
        file = folder / f"{model.replace(' ', '-')}-{guidance}.png"
        figure.savefig(file, dpi=110)
        files.append(file)
    return files


def new_figure(width: float, height: float) -> Any:
    """An empty figure; width and height in inches.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    optional_packages.require("matplotlib", "A plot")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def command_line() -> list[str]:
    return ["python", "-m", "scripts.bench", *sys.argv[1:]]
