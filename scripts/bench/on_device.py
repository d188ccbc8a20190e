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
from hypergen.errors import ConfigurationError, ModelError
from scripts.bench import device_tables, report, timeline
from scripts.bench.device import OURS, STOCK, STOCK_COMPILED, VARIANTS, Measured, Plan, speed_of, stock
from scripts.bench.figures import Run, figures_of
from scripts.bench.goals import goals, unmeasured_goals
from scripts.bench.jobs import Job, job_list
from scripts.bench.live import LiveEngine, free_memory, live_engine
from scripts.bench.policies import FinishedJob, sequential_at_interval
from scripts.bench.published import RANDOM_WEIGHTS, refuse_on_cpu
from scripts.bench.work import Work, family_of, work_of

logger = logging.getLogger(__name__)

# Without compilation, probing more rows than necessary only takes seconds.
_MIN_PROBED_BATCH = 4
_TRACE_SHARE = 1 / 3  # of the time budget of one model


@dataclass(frozen=True)
class Trace:
    """The mixed trace: `seeds` lists of `jobs` jobs each, at these loads."""

    loads: Sequence[float]
    seeds: int
    jobs: int


class Budget:
    """The time for one model; a measurement only starts if it will probably end in time."""

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self._ends_at = time.monotonic() + self.seconds
        self._longest: dict[str, float] = {}

    def has_time_for(self, mode: str) -> bool:
        """Whether another measurement in this mode fits, if it takes as long as the longest one so far."""
        return time.monotonic() + self._longest.get(mode, 0.0) < self._ends_at

    @contextmanager
    def measuring(self, mode: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._longest[mode] = max(self._longest.get(mode, 0.0), time.monotonic() - started)


def measure(
    console: Console,
    output: Path,
    name: str,
    settings: EngineSettings,
    plan: Plan,
    trace: Trace,
    minutes: float,
) -> Measured:
    """Measure one model with random weights on one device with a wall clock.

    The most important measurements first, while there is time: stock diffusers eager and compiled, the last
    variant with the timeline and the mixed trace, then the other variants.

    Raises:
        ConfigurationError: the model has no random weights, or is too large for a CPU.
    """
    device = settings.device or "cpu"
    if name not in RANDOM_WEIGHTS:
        raise ConfigurationError(
            f"Settings are only measured for models with random weights; '{name}' is trained."
        )
    if device == "cpu":
        refuse_on_cpu(name)
    bench = _Bench(console, output, name, settings, plan, trace, Budget(minutes))
    measured = bench.measured
    for way in _ways(plan, device):
        if not bench.budget.has_time_for(_mode(way)):
            measured.left_out[way] = f"the {minutes:g} minutes are over"
            continue
        try:
            with console.status(way):
                bench.measure(way)
        except ModelError as error:
            measured.left_out[way] = str(error)
        except Exception as error:  # Isolate the failure: the others are still measured.
            logger.exception("Measuring '%s' failed.", way)
            measured.left_out[way] = f"{type(error).__name__}: {str(error)[:200]}"
        bench.write()
    if device == "cuda":
        measured.goals = list(goals(name, plan, measured.speeds, measured.runs, measured.stages))
        measured.unmeasured = unmeasured_goals(name, measured.goals)
    bench.write()
    device_tables.print_all(console, measured)
    for file in report.plot(output, measured.runs):
        console.print(f"Plot: {file}", highlight=False)
    return measured


def _ways(plan: Plan, device: str) -> list[str]:
    """In order of measurement. Without compiled diffusers on a CPU, where compilation takes minutes."""
    stock_ways = [STOCK] if device == "cpu" else [STOCK, STOCK_COMPILED]
    return [*stock_ways, plan.variants[-1], *plan.variants[:-1]]


def _mode(way: str) -> str:
    return "compiled" if way == STOCK_COMPILED or "compile" in VARIANTS.get(way, {}) else "eager"


class _Bench:
    """The measurements of one model on its device."""

    def __init__(
        self,
        console: Console,
        output: Path,
        name: str,
        settings: EngineSettings,
        plan: Plan,
        trace: Trace,
        budget: Budget,
    ) -> None:
        self._console = console
        self._output = output
        self._name = name
        self._settings = settings
        self._plan = plan
        self._trace = trace
        self.budget = budget
        model = RANDOM_WEIGHTS[name]
        self._side = model.side
        self._trace_side = plan.trace_side or model.side
        dtype = getattr(torch, settings.dtype or "float32")
        self._pipeline = model.pipeline(settings.device or "cpu", dtype)
        self._pipeline.set_progress_bar_config(disable=True)
        self._work: Work = work_of(family_of(self._pipeline, model.side, settings), model.side)
        environment = report.environment(report.command_line())
        self.measured = Measured(name, model.side, settings.determinism, environment, plan, self._work)
        device_tables.print_work(console, self.measured)

    def measure(self, way: str) -> None:
        """Measure the speed; with the first variant that works, also the timeline and the trace."""
        free_memory()
        if way in (STOCK, STOCK_COMPILED):
            with self.budget.measuring(_mode(way)):
                self._measure_stock(way)
            return
        wants_trace = not self.measured.runs
        self._measure_engine(way, wants_trace)
        if not wants_trace or self.measured.runs:
            return
        if not self.budget.has_time_for(_mode(way)):
            self.measured.left_out[f"trace and timeline, {way}"] = "no time left"
            return
        free_memory()
        plan = self._plan
        with live_engine(
            self._pipeline, self._trace_side, self._settings_for(way, plan.trace_batch)
        ) as engine:
            self._record_forwards(way, engine)
            self._measure_trace(engine)

    def _measure_engine(self, way: str, wants_trace: bool) -> None:
        """Measure single images and a batch, and the trace if it needs the same engine settings."""
        plan, batch_size = self._plan, self._plan.batch_size
        if _mode(way) == "eager":
            batch_size = max(batch_size, _MIN_PROBED_BATCH)
        with live_engine(self._pipeline, self._side, self._settings_for(way, batch_size)) as engine:
            with self.budget.measuring(_mode(way)):
                self._measure_speed(
                    OURS + way, lambda jobs: engine.run(jobs, 0), lambda: engine.images_per_forward
                )
                self._record_forwards(way, engine)
            if wants_trace and (self._side, batch_size) == (self._trace_side, plan.trace_batch):
                self._measure_trace(engine)

    def write(self) -> None:
        """Write the results so far as JSON; called after each measurement, so that none is lost."""
        records = asdict(self.measured) | {"goals": report.as_records(self.measured.goals)}
        file = self._output / f"{self._name}.json"
        file.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")

    def _settings_for(self, way: str, batch_size: int) -> EngineSettings:
        return self._settings.model_copy(update={**VARIANTS[way], "max_batch_size": batch_size})

    def _measure_stock(self, way: str) -> None:
        compiled = way == STOCK_COMPILED
        policy = stock(self._pipeline, self._side, self._plan.batch_size, compiled=compiled)
        self._measure_speed(way, lambda jobs: policy.run(jobs, 0), lambda: policy.images_per_forward)

    def _measure_speed(
        self,
        way: str,
        run: Callable[[Sequence[Job]], list[FinishedJob]],
        images_per_forward: Callable[[], float],
    ) -> None:
        speed = speed_of(way, run, images_per_forward, self._plan, self._work)
        self.measured.speeds.append(speed)
        self._console.print(
            f"{way}: {speed.alone_s:.3f} s per single image, {speed.batch_images_per_s:.2f} images/s",
            highlight=False,
        )

    def _record_forwards(self, way: str, engine: LiveEngine) -> None:
        self.measured.forwards += [{"way": way, **entry} for entry in forwards_of(engine)]

    def _measure_trace(self, engine: LiveEngine) -> None:
        """Measure the timeline, then each mixed job list: sequentially and with step-level batching."""
        measured, plan = self.measured, self._plan
        measured.served_by = self.measured.speeds[-1].way
        spans = timeline.record(engine, plan.steps, self._output / f"{self._name}-timeline.json")
        measured.stages = timeline.shares(spans)
        timeline.plot(
            spans, f"{self._name}, {measured.served_by}", self._output / f"{self._name}-timeline.png"
        )
        model = f"{self._name} {engine.side}x{engine.side}"
        started = time.monotonic()
        for seed in range(self._trace.seeds):
            # At least one list; then as many as probably fit into the trace's share of the time.
            expected_s = (time.monotonic() - started) * (seed + 1) / max(seed, 1)
            if seed and expected_s > _TRACE_SHARE * self.budget.seconds:
                skipped = f"the trace's job lists after the first {seed} of {self._trace.seeds}"
                measured.left_out[skipped] = "no time left"
                return
            measured.runs += _runs_of(model, engine, seed, self._trace)


def _runs_of(model: str, engine: LiveEngine, seed: int, trace: Trace) -> Iterator[Run]:
    jobs = job_list(trace.jobs, seed)
    calls: list[FinishedJob] = []
    for job in jobs:
        started = calls[-1].finished_at if calls else 0.0
        calls.append(FinishedJob(job, started, started + engine.run([job], 0)[0].latency_s))
    for load in trace.loads:
        interval_s = calls[-1].finished_at / len(calls) / load
        sequential = figures_of(sequential_at_interval(calls, interval_s))
        yield Run(model, "mixed", load, seed, "sequential", sequential, 1)
        batched = figures_of(engine.run(jobs, interval_s))
        yield Run(model, "mixed", load, seed, "step", batched, engine.images_per_forward)


def forwards_of(live: LiveEngine) -> list[dict[str, Any]]:
    """For each probed size and row count: seconds of a forward pass, whether it is bit-exact, and whether the
    engine uses it.
    """
    records: list[dict[str, Any]] = []
    profiles = live.engine.shape_profiles
    for key, probe in profiles.probes.items():
        curve = profiles.costs[key]
        for rows in sorted({*probe.seconds, *probe.differing}):
            records.append(
                {
                    "size": f"{probe.width}x{probe.height}",
                    "rows": rows,
                    "seconds": probe.seconds.get(rows),
                    "exact": rows not in probe.differing,
                    "serves": curve.padded(rows) == rows,
                    "verdict": probe.verdict,
                }
            )
    return records
