"""What `python -m scripts.bench --device` measures of a model, prints and writes."""

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
from scripts.bench.goals import goals, unanswered
from scripts.bench.jobs import Job, job_list
from scripts.bench.live import Live, free_memory, serving
from scripts.bench.policies import Served, one_after_another
from scripts.bench.published import DRAWN, refuse_on_cpu
from scripts.bench.work import Work, family_of, work_of

logger = logging.getLogger(__name__)

# An engine that is not compiled can be probed with more rows than are asked for, which costs seconds.
_PROBED_BATCH = 4
_TRACE_SHARE = 1 / 3  # of the time for one model


@dataclass(frozen=True)
class Trace:
    """The mixed trace: which lists of how many jobs, at which loads."""

    loads: Sequence[float]
    seeds: int
    jobs: int


class Budget:
    """How long one model may take: nothing is begun that would probably not end in time."""

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self._ends_at = time.monotonic() + self.seconds
        self._longest: dict[str, float] = {}

    def has_room_for(self, kind: str) -> bool:
        """Whether one more of a kind fits, if it takes as long as the longest so far."""
        return time.monotonic() + self._longest.get(kind, 0.0) < self._ends_at

    @contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._longest[kind] = max(self._longest.get(kind, 0.0), time.monotonic() - started)


def measure(
    console: Console,
    output: Path,
    name: str,
    settings: EngineSettings,
    plan: Plan,
    trace: Trace,
    minutes: float,
) -> Measured:
    """Measure one model with random weights on one device, on the wall's clock.

    In the order of what matters most, as long as there is time: stock diffusers eager and compiled, the last
    variant with the timeline and the mixed trace, then the other variants.

    Raises:
        ConfigurationError: the model has no random weights, or is too large for a CPU.
    """
    device = settings.device or "cpu"
    if name not in DRAWN:
        raise ConfigurationError(f"Settings are measured with random weights; '{name}' has its own.")
    if device == "cpu":
        refuse_on_cpu(name)
    bench = _Bench(console, output, name, settings, plan, trace, Budget(minutes))
    measured = bench.measured
    for way in _ways(plan, device):
        if not bench.budget.has_room_for(_kind(way)):
            measured.left_out[way] = f"the {minutes:g} minutes are over"
            continue
        try:
            with console.status(way):
                bench.measure(way)
        except ModelError as error:
            measured.left_out[way] = str(error)
        except Exception as error:  # the edge where one way's trouble must not cost the others' figures
            logger.exception("Measuring '%s' failed.", way)
            measured.left_out[way] = f"{type(error).__name__}: {str(error)[:200]}"
        bench.write()
    if device == "cuda":
        measured.goals = list(goals(name, plan, measured.speeds, measured.runs, measured.stages))
        measured.unmeasured = unanswered(name, measured.goals)
    bench.write()
    device_tables.print_all(console, measured)
    for file in report.plot(output, measured.runs):
        console.print(f"Plot: {file}", highlight=False)
    return measured


def _ways(plan: Plan, device: str) -> list[str]:
    """In the order in which they are measured; on a CPU compiling stock diffusers takes minutes."""
    stock_ways = [STOCK] if device == "cpu" else [STOCK, STOCK_COMPILED]
    return [*stock_ways, plan.variants[-1], *plan.variants[:-1]]


def _kind(way: str) -> str:
    return "compiled" if way == STOCK_COMPILED or "compile" in VARIANTS.get(way, {}) else "eager"


class _Bench:
    """One model on its device, and what was found so far."""

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
        model = DRAWN[name]
        self._side = model.side
        self._trace_side = plan.trace_side or model.side
        dtype = getattr(torch, settings.dtype or "float32")
        self._pipeline = model.pipeline(settings.device or "cpu", dtype)
        self._pipeline.set_progress_bar_config(disable=True)
        self._work: Work = work_of(family_of(self._pipeline, model.side, settings), model.side)
        found = report.environment(report.command_line())
        self.measured = Measured(name, model.side, settings.determinism, found, plan, self._work)
        device_tables.print_work(console, self.measured)

    def measure(self, way: str) -> None:
        """One way of drawing, and with the first variant that can draw the timeline and the trace."""
        free_memory()
        if way in (STOCK, STOCK_COMPILED):
            with self.budget.spending(_kind(way)):
                self._measure_stock(way)
            return
        wants_trace = not self.measured.runs
        self._measure_ours(way, wants_trace)
        if not wants_trace or self.measured.runs:
            return
        if not self.budget.has_room_for(_kind(way)):
            self.measured.left_out[f"trace and timeline, {way}"] = "no time for them"
            return
        free_memory()
        plan = self._plan
        with serving(self._pipeline, self._trace_side, self._changed(way, plan.trace_batch)) as live:
            self._note_passes(way, live)
            self._measure_trace(live)

    def _measure_ours(self, way: str, wants_trace: bool) -> None:
        """A lone picture and a crowd; and the trace, if the same engine can serve it."""
        plan, batch = self._plan, self._plan.crowd
        if _kind(way) == "eager":
            batch = max(batch, _PROBED_BATCH)
        with serving(self._pipeline, self._side, self._changed(way, batch)) as live:
            with self.budget.spending(_kind(way)):
                self._take(OURS + way, lambda jobs: live.serve(jobs, 0), lambda: live.images_per_pass)
                self._note_passes(way, live)
            if wants_trace and (self._side, batch) == (self._trace_side, plan.trace_batch):
                self._measure_trace(live)

    def write(self) -> None:
        """What was found, as JSON: again after every way, so that nothing is lost."""
        records = asdict(self.measured) | {"goals": report.as_records(self.measured.goals)}
        file = self._output / f"{self._name}.json"
        file.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")

    def _changed(self, way: str, batch: int) -> EngineSettings:
        return self._settings.model_copy(update={**VARIANTS[way], "max_batch_size": batch})

    def _measure_stock(self, way: str) -> None:
        compiled = way == STOCK_COMPILED
        whole = stock(self._pipeline, self._side, self._plan.crowd, compiled=compiled)
        self._take(way, lambda jobs: whole.serve(jobs, 0), lambda: whole.images_per_pass)

    def _take(
        self, way: str, serve: Callable[[Sequence[Job]], list[Served]], images_per_pass: Callable[[], float]
    ) -> None:
        speed = speed_of(way, serve, images_per_pass, self._plan, self._work)
        self.measured.speeds.append(speed)
        self._console.print(
            f"{way}: {speed.alone_s:.3f} s alone, {speed.crowd_per_s:.2f} a second", highlight=False
        )

    def _note_passes(self, way: str, live: Live) -> None:
        self.measured.passes += [{"way": way, **entry} for entry in passes_of(live)]

    def _measure_trace(self, live: Live) -> None:
        """The timeline, then each mixed job list: call after call to the engine, and the same engine with
        everything at once.
        """
        measured, plan = self.measured, self._plan
        measured.served_by = self.measured.speeds[-1].way
        spans = timeline.watch(live, plan.steps, self._output / f"{self._name}-timeline.json")
        measured.stages = timeline.shares(spans)
        timeline.plot(
            spans, f"{self._name}, {measured.served_by}", self._output / f"{self._name}-timeline.png"
        )
        model = f"{self._name} {live.side}x{live.side}"
        started = time.monotonic()
        for seed in range(self._trace.seeds):
            # At least one list; then as long as another one is likely to fit into the trace's share.
            expected_s = (time.monotonic() - started) * (seed + 1) / max(seed, 1)
            if seed and expected_s > _TRACE_SHARE * self.budget.seconds:
                left = f"the trace's job lists after the first {seed} of {self._trace.seeds}"
                measured.left_out[left] = "no time for them"
                return
            measured.runs += _runs_of(model, live, seed, self._trace)


def _runs_of(model: str, live: Live, seed: int, trace: Trace) -> Iterator[Run]:
    jobs = job_list(trace.jobs, seed)
    calls: list[Served] = []
    for job in jobs:
        started = calls[-1].finished_at if calls else 0.0
        calls.append(Served(job, started, started + live.serve([job], 0)[0].latency_s))
    for load in trace.loads:
        interval_s = calls[-1].finished_at / len(calls) / load
        alone = figures_of(one_after_another(calls, interval_s))
        yield Run(model, "mixed", load, seed, "sequential", alone, 1)
        together = figures_of(live.serve(jobs, interval_s))
        yield Run(model, "mixed", load, seed, "step", together, live.images_per_pass)


def passes_of(live: Live) -> list[dict[str, Any]]:
    """For each drawn size and number of rows that was tried: seconds of a pass, whether its rows have the
    bits that they have in other passes, and whether the engine makes such passes.
    """
    found: list[dict[str, Any]] = []
    for key, probe in live.engine.shape_profiles.probes.items():
        curve = live.engine.shape_profiles.costs[key]
        for rows in sorted({*probe.seconds, *probe.differing}):
            found.append(
                {
                    "size": f"{probe.width}x{probe.height}",
                    "rows": rows,
                    "seconds": probe.seconds.get(rows),
                    "exact": rows not in probe.differing,
                    "serves": curve.allows(rows),
                    "verdict": probe.verdict,
                }
            )
    return found
