"""What `hypergen bench --device` measures of a model, prints and writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hypergen.bench import report
from hypergen.bench.device import Live, Speed, speeds
from hypergen.bench.figures import Run, figures_of
from hypergen.bench.jobs import Job, job_list
from hypergen.bench.models import RANDOM_MODELS
from hypergen.bench.policies import Served, one_after_another
from hypergen.config import EngineSettings
from hypergen.errors import ConfigurationError


def measure(
    console: Console,
    output: Path,
    name: str,
    settings: EngineSettings,
    *,
    variants: Sequence[str],
    steps: int,
    crowd: int,
    loads: Sequence[float],
    seeds: int,
    jobs: int,
) -> None:
    """Measure one model with random weights on one device, on the wall's clock.

    Speeds of every setting against stock diffusers and against the floor, the passes that serve and whether
    they are proved exact, a timeline, and the mixed trace of the last variant against calls one by one.

    Raises:
        ConfigurationError: the model has no random weights.
    """
    if name not in RANDOM_MODELS:
        raise ConfigurationError(f"Settings are measured with random weights; '{name}' has its own.")
    model = RANDOM_MODELS[name]
    found = report.environment(report.command_line())
    measured: list[Speed] = []
    passes: list[dict[str, Any]] = []
    runs: list[Run] = []
    for speed, live in speeds(model, settings, steps, crowd, 3, variants):
        measured.append(speed)
        per_s = f"{speed.crowd_per_s:.2f} a second"
        console.print(f"{speed.way}: {speed.alone_s:.3f} s alone, {per_s}", highlight=False)
        if live is None:
            continue
        passes += [{"way": speed.way, **entry} for entry in passes_of(live)]
        if speed.way == f"HyperGen, {variants[-1]}":
            write_timeline(live, output / f"{name}-timeline.json", steps)
            runs = list(_trace(name, live, loads, seeds, jobs))
    _print_speeds(console, f"{name}, {model.side}x{model.side}, {steps} steps, guided", measured)
    _print_passes(console, passes)
    report.print_runs(console, runs)
    content = {
        "environment": found,
        "speeds": [asdict(speed) for speed in measured],
        "passes": passes,
        "runs": [asdict(run) for run in runs],
    }
    (output / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if not runs:
        console.print(
            f"No trace and no timeline: '{variants[-1]}' cannot run on this device.", highlight=False
        )


def _trace(name: str, live: Live, loads: Sequence[float], seeds: int, jobs: int) -> Iterator[Run]:
    """The mixed job list: call after call to the engine, and the same engine with everything at once."""
    for seed in range(seeds):
        trace = job_list(jobs, seed)
        calls: list[Served] = []
        for job in trace:
            started = calls[-1].finished_at if calls else 0.0
            calls.append(Served(job, started, started + live.serve([job], 0)[0].latency_s))
        for load in loads:
            interval_s = calls[-1].finished_at / len(calls) / load
            alone = figures_of(one_after_another(calls, interval_s))
            yield Run(name, "mixed", load, seed, "sequential", alone, 1)
            together = figures_of(live.serve(trace, interval_s))
            yield Run(name, "mixed", load, seed, "step", together, live.images_per_pass)


def write_timeline(live: Live, file: Path, steps: int) -> None:
    """A trace for chrome://tracing or Perfetto of pictures that arrive while others are drawn: text encoding,
    passes, decoding and encoding, thread by thread and stream by stream.
    """
    jobs = [Job(number, 2.0 * number, steps, 5.0) for number in range(4)]
    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)  # pyright: ignore[reportAttributeAccessIssue]  torch has no public name for it
    with torch.profiler.profile(experimental_config=every_thread) as profile:
        live.serve(jobs, 0.05)
    profile.export_chrome_trace(str(file))


def passes_of(live: Live) -> list[dict[str, Any]]:
    """For each drawn size and number of rows: seconds of a pass, and whether it is proved exact."""
    found: list[dict[str, Any]] = []
    for key, curve in live.engine.shapes.costs.items():
        size = "x".join(str(8 * side) for side in reversed(key.latent_shape[1:]))
        exact = live.engine.status().determinism.get(size) == "exact"
        for rows, seconds in sorted(curve.seconds.items()):
            proved = exact and curve.serves(rows)
            found.append({"size": size, "rows": rows, "seconds": seconds, "exact": proved})
    return found


def _print_speeds(console: Console, title: str, measured: Sequence[Speed]) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("way", "alone s", "of floor", "pictures/s", "of floor"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for speed in measured:
        table.add_row(
            speed.way,
            f"{speed.alone_s:.3f}",
            f"{speed.alone_of_floor:.0%}",
            f"{speed.crowd_per_s:.2f}",
            f"{speed.crowd_of_floor:.0%}",
        )
    console.print(table)


def _print_passes(console: Console, passes: Sequence[dict[str, Any]]) -> None:
    table = Table(title="Passes that serve", title_justify="left")
    for column in ("way", "size", "rows", "ms", "exact"):
        table.add_column(column)
    for entry in passes:
        table.add_row(
            entry["way"],
            entry["size"],
            str(entry["rows"]),
            f"{1000 * entry['seconds']:.1f}",
            "yes" if entry["exact"] else "no",
        )
    console.print(table)
