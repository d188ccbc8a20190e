"""`python -m scripts.bench --device`: measures a model on a device, prints and writes the results."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hypergen.config import EngineSettings
from hypergen.engine.batch_invariance.shape_profiles import ShapeProfiles
from hypergen.errors import ConfigurationError
from scripts.bench import device, device_tables, report, timeline
from scripts.bench.device import VARIANTS, Measured, Plan, Speed
from scripts.bench.figures import Run, figures_of
from scripts.bench.goals import goals
from scripts.bench.jobs import Job, job_list
from scripts.bench.live import LiveEngine, free_memory, live_engine
from scripts.bench.policies import FinishedJob, sequential_at_interval
from scripts.bench.published import RANDOM_WEIGHTS, dtype_for, refuse_on_cpu
from scripts.bench.rows import ROW_COUNTS, measure_rows
from scripts.bench.work import family_of, work_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trace:
    """The mixed trace: `seeds` lists of `jobs` jobs each, at these loads."""

    loads: Sequence[float]
    seeds: int
    jobs: int


def measure(
    console: Console, output: Path, name: str, settings: EngineSettings, plan: Plan, trace: Trace
) -> Measured:
    """Measure one model with random weights on one device with a wall clock.

    A measurement that fails or no longer fits into the time is listed with the reason; the others still run.

    Raises:
        ConfigurationError: the model has no random weights, or is too large for a CPU.
    """
    if name not in RANDOM_WEIGHTS:
        raise ConfigurationError(
            f"Settings are only measured for models with random weights; '{name}' is trained."
        )
    if settings.device != "cuda":
        refuse_on_cpu(name)
    bench = _Bench(console, name, settings, plan, trace, output)
    measured = bench.measured
    for measurement in plan.measurements:
        if bench.seconds_left <= 0:
            measured.left_out[measurement] = bench.time_is_over
            continue
        started = time.monotonic()
        try:
            with console.status(f"{name}: {measurement}"):
                bench.run(measurement)
        except Exception as error:  # Isolate the failure: the others are still measured.
            logger.exception("Measuring '%s' failed.", measurement)
            reason = str(error).partition("\n")[0][:200]
            measured.left_out[measurement] = f"{type(error).__name__}: {reason}"
        measured.seconds[measurement] = time.monotonic() - started
        bench.write()
    if settings.device == "cuda":
        measured.goals, measured.unmeasured = goals(measured)
    bench.write()
    console.print(device_tables.markdown(measured), markup=False, highlight=False, soft_wrap=True)
    return measured


class _Bench:
    """The measurements of one model on its device."""

    def __init__(
        self,
        console: Console,
        name: str,
        settings: EngineSettings,
        plan: Plan,
        trace: Trace,
        output: Path,
    ) -> None:
        self._ends_at = time.monotonic() + 60 * plan.minutes
        self._console = console
        self._output = output
        self._model = RANDOM_WEIGHTS[name]
        self._settings = settings
        self._plan = plan
        self._trace = trace
        self._dtype = dtype_for(self._model, settings)
        family = family_of(self._pipeline(), self._model.side, settings)
        self.measured = Measured(
            model=name,
            side=self._model.side,
            dtype=str(self._dtype).removeprefix("torch."),
            vae_dtype=str(family.vae.dtype).removeprefix("torch."),
            environment=report.environment(report.command_line()),
            plan=plan,
            work=work_of(family, self._model.side),
        )

    @property
    def seconds_left(self) -> float:
        return self._ends_at - time.monotonic()

    @property
    def time_is_over(self) -> str:
        return f"the {self._plan.minutes:g} minutes are over"

    def run(self, measurement: str) -> None:
        """Run one measurement and add its results to `measured`."""
        free_memory()
        if measurement in (device.STOCK, device.STOCK_COMPILED):
            self._measure_stock(measurement)
        elif measurement == device.ROWS:
            self._measure_rows()
        elif measurement == device.TRACE:
            self._measure_trace()
        elif measurement == device.PROFILE:
            self._profile()
        else:
            self._measure_variant(measurement)

    def write(self) -> None:
        """Write the results so far; called after each measurement, so that none is lost."""
        measured = self.measured
        records = asdict(measured) | {"goals": report.as_records(measured.goals)}
        file = self._output / f"{measured.model}.json"
        file.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        file.with_suffix(".md").write_text(device_tables.markdown(measured) + "\n", encoding="utf-8")

    def _pipeline(self) -> Any:
        """New for each measurement: engines and compilers change networks, and memory is that of one."""
        pipeline = self._model.pipeline(self._settings.device or "cpu", self._dtype)
        pipeline.set_progress_bar_config(disable=True)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return pipeline

    @contextmanager
    def _engine(self, variant: str, side: int) -> Iterator[LiveEngine]:
        settings = self._settings.model_copy(update=VARIANTS[variant])
        with live_engine(self._pipeline(), side, settings) as engine:
            yield engine

    def _measure_stock(self, way: str) -> None:
        compiled = way == device.STOCK_COMPILED
        policy = device.stock(self._pipeline(), self._model.side, self._plan.batch_size, compiled=compiled)
        self._measure_speed(way, lambda jobs: policy.run(jobs, 0), lambda: policy.mean_batch_size)

    def _measure_variant(self, variant: str) -> None:
        with self._engine(variant, self._model.side) as engine:
            self._measure_speed(variant, lambda jobs: engine.run(jobs, 0), lambda: engine.mean_batch_size)

    def _measure_speed(
        self,
        way: str,
        run: Callable[[Sequence[Job]], list[FinishedJob]],
        mean_batch_size: Callable[[], float],
    ) -> None:
        plan, work = self._plan, self.measured.work
        alone_s, batch_s = device.time_images(run, plan)
        floor_s = work.floor_s(plan.steps)
        images_per_s = plan.batch_size / batch_s
        self.measured.speeds.append(
            Speed(
                way=way,
                alone_s=alone_s,
                alone_of_floor=floor_s / alone_s,
                batch_images_per_s=images_per_s,
                batch_of_floor=images_per_s * floor_s,
                batch_rows=work.rows * mean_batch_size(),
                peak_gb=torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
            )
        )
        self._console.print(
            f"{way}: {alone_s:.3f} s per single image, {images_per_s:.2f} images/s", highlight=False
        )

    def _measure_rows(self) -> None:
        """At the model's size, and at that of the trace."""
        family = family_of(self._pipeline(), self._model.side, self._settings)
        profiles = ShapeProfiles(family, self._settings)
        for side in dict.fromkeys((self._model.side, self._trace_side)):
            shape = measure_rows(family, profiles, side, self._plan.steps)
            self.measured.shapes.append(shape)
            if too_large := ROW_COUNTS[len(shape.row_counts) :]:
                rows = ", ".join(map(str, too_large))
                self.measured.left_out[f"{rows} rows at {shape.size}"] = "out of memory"

    @property
    def _trace_side(self) -> int:
        return self._plan.trace_side or self._model.side

    def _measure_trace(self) -> None:
        """Each job list sequentially and with step-level batching; at least one, then while there is time."""
        with self._engine(device.DEFAULT, self._trace_side) as engine:
            for seed in range(self._trace.seeds):
                started = time.monotonic()
                self._run_job_list(engine, seed)
                done = seed + 1
                if done < self._trace.seeds and self.seconds_left < time.monotonic() - started:
                    skipped = f"{self._trace.seeds - done} of {self._trace.seeds} job lists of the trace"
                    self.measured.left_out[skipped] = self.time_is_over
                    return

    def _run_job_list(self, engine: LiveEngine, seed: int) -> None:
        measured = self.measured
        model = f"{measured.model} {engine.side}x{engine.side}"
        jobs = job_list(self._trace.jobs, seed)
        calls: list[FinishedJob] = []
        alone: dict[int, bytes] = {}
        for job in jobs:
            started = calls[-1].finished_at if calls else 0.0
            calls.append(FinishedJob(job, started, started + engine.run([job], 0)[0].latency_s))
            alone |= engine.files
        for load in self._trace.loads:
            interval_s = calls[-1].finished_at / len(calls) / load
            sequential = figures_of(sequential_at_interval(calls, interval_s))
            measured.runs.append(Run(model, "mixed", load, seed, "sequential", sequential, 1))
            batched = figures_of(engine.run(jobs, interval_s))
            measured.runs.append(Run(model, "mixed", load, seed, "step", batched, engine.mean_batch_size))
            equal, total = measured.same_bytes
            equal += sum(engine.files[number] == data for number, data in alone.items())
            measured.same_bytes = equal, total + len(alone)

    def _profile(self) -> None:
        with self._engine(device.DEFAULT, self._trace_side) as engine:
            file = self._output / f"{self.measured.model}-timeline.json"
            self.measured.device_busy = timeline.record(engine, self._plan.steps, file)
