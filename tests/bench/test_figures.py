"""The calculations of the benchmarks, on example runs."""

from __future__ import annotations

import pytest

from scripts.bench.clock import Clock
from scripts.bench.figures import Figures, Run, figures_of, median_of, median_ratio
from scripts.bench.gates import Gate, trace_gates
from scripts.bench.jobs import GUIDANCE_SCALES, STEPS, Job, job_list
from scripts.bench.policies import FinishedJob, sequential_at_interval


def _finished(number: int, queued_at: float, finished_at: float, steps: int = 20) -> FinishedJob:
    return FinishedJob(Job(number, queued_at, steps, 5.0), queued_at, finished_at)


def _run(policy: str, seed: int, factor: float, model: str = "small", load: float = 1.5) -> Run:
    """A run with `factor` times better results than 1."""
    figures = Figures(factor, 1 / factor, 1 / factor, 1 / factor)
    return Run(model, "mixed", load, seed, policy, figures, 1)


def test_a_job_list_is_the_same_for_the_same_seed_and_arrives_at_rate_one() -> None:
    jobs = job_list(2000, 3)
    assert jobs == job_list(2000, 3)
    assert jobs[:50] != job_list(50, 4)
    assert jobs[-1].arrival / 2000 == pytest.approx(1, rel=0.1)
    assert {job.num_inference_steps for job in jobs} == set(STEPS)
    assert {job.guidance_scale for job in jobs} == set(GUIDANCE_SCALES)
    assert {job.guidance_scale for job in job_list(50, 3, (5.0,))} == {5.0}
    assert len({job.prompt for job in jobs}) == 2000


def test_figures_are_nearest_rank_percentiles_of_latency() -> None:
    finished = [_finished(number, number, number + 1 + number / 10) for number in range(20)]
    finished[3] = _finished(3, 3, 10, steps=8)
    figures = figures_of(finished)
    assert figures.throughput == pytest.approx(20 / (19 + 2.9))
    assert figures.p50_s == pytest.approx(2.0)
    assert figures.p95_s == pytest.approx(2.9)
    assert figures.short_p95_s == 7


def test_the_median_ratio_is_over_ratios_per_seed() -> None:
    runs = [_run("sequential", seed, factor) for seed, factor in enumerate((1, 2, 4))]
    runs += [_run("step", seed, factor) for seed, factor in enumerate((3, 4, 20))]
    assert median_of(runs, "step").throughput == 4
    assert median_ratio(runs, "step", "sequential") == pytest.approx(Figures(3, 3, 3, 3))


def test_sequential_calls_at_another_load_start_after_the_previous_one() -> None:
    calls = [_finished(0, 0, 2), _finished(1, 1, 5), _finished(2, 2, 6)]
    finished = sequential_at_interval(calls, interval_s=2.5)
    assert [job.queued_at for job in finished] == [0, 2.5, 5]
    assert [job.finished_at for job in finished] == [2, 5.5, 6.5]


def test_the_clock_skips_idle_time_and_never_goes_back() -> None:
    now = 10.0
    clock = Clock(lambda: now)
    assert clock() == 0
    clock.skip_to(3)
    clock.skip_to(1)
    now = 11.5
    assert clock() == 4.5


def test_gates_report_missed_limits() -> None:
    runs = [_run("sequential", 0, 1), _run("static", 0, 1), _run("step", 0, 3.5), _run("step-fast", 0, 3.7)]
    gates = {gate.what: gate for gate in trace_gates(runs)}
    assert len(gates) == 8
    missed = [what for what, gate in gates.items() if not gate.reached]
    assert len(missed) == 3
    assert sum("short jobs" in what for what in missed) == 2
    assert sum("without batch invariance" in what for what in missed) == 1
    assert gates["small, load 1.5: throughput against static"].measured == pytest.approx(3.5)


def test_a_gate_is_reached_at_its_exact_limit() -> None:
    assert Gate("at least", 2.0, 2).reached
    assert Gate("at most", 2.0, 2, at_most=True).reached
    assert not Gate("at most", 2.01, 2, at_most=True).reached
    assert Gate("at most", 1, 1.02, at_most=True).shown_limit == "≤ 1.02"
