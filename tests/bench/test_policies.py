"""The policies with a small model: every job is run once, with the bytes of a single request."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from scripts.bench.__main__ import main
from scripts.bench.alone import same_bytes_alone
from scripts.bench.clock import Clock
from scripts.bench.gates import trace_gates
from scripts.bench.jobs import Job, job_list
from scripts.bench.policies import StaticBatching
from scripts.bench.traces import Comparison, load_comparison, measure
from tests.support.sync_engine import make_settings


@pytest.fixture(scope="module")
def small() -> Comparison:
    return load_comparison("small", make_settings(max_batch_size=4))


def _short(jobs: list[Job]) -> list[Job]:
    return [replace(job, num_inference_steps=2 + job.num_inference_steps // 10) for job in jobs]


def test_every_policy_runs_every_job_once_after_its_arrival(small: Comparison) -> None:
    jobs = _short(job_list(12, 0))
    for name in ("sequential", "static", "step", "step-fast"):
        finished = small.policy(name).run(jobs, interval_s=0.02)
        assert sorted(entry.job.number for entry in finished) == list(range(12))
        assert all(entry.finished_at > entry.queued_at for entry in finished)
    assert small.sequential.mean_batch_size == 1
    assert small.step.mean_batch_size > 1
    assert same_bytes_alone(small, jobs, count=4) == (4, 4)


def test_static_batches_have_jobs_with_equal_settings(small: Comparison) -> None:
    jobs = [Job(number, 0, steps, 5.0) for number, steps in enumerate((2, 3, 2, 2, 3))]
    batches: list[list[int]] = []

    class RecordingStaticBatching(StaticBatching):
        def generate(self, jobs: Sequence[Job]) -> list[bytes]:
            batches.append([job.number for job in jobs])
            return super().generate(jobs)

    static = RecordingStaticBatching(small.sequential.pipeline, small.side, 2, Clock())
    static.run(jobs, 0)
    assert batches == [[0, 2], [1, 4], [3]]
    assert static.mean_batch_size == pytest.approx(12 / 7)


def test_the_order_of_the_policies_rotates_and_all_loads_are_measured(small: Comparison) -> None:
    runs = list(measure(small, ["static", "step"], [1.5, 3.0], seeds=2, jobs=2, guidance="one"))
    assert [(run.seed, run.policy, run.load) for run in runs] == [
        *((0, policy, load) for policy in ("static", "step") for load in (1.5, 3.0)),
        *((1, policy, load) for policy in ("step", "static") for load in (1.5, 3.0)),
    ]


def test_a_run_prints_its_table_and_writes_figures_and_plots(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.bench", "--policy", "step", "--load", "1.5"]
    command += ["--jobs", "10", "--seeds", "1", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert "load average" in result.stdout
    assert "small, load 1.5, mixed guidance, median of 1 seeds" in result.stdout
    content = json.loads((tmp_path / "bench.json").read_text())
    assert [run["policy"] for run in content["runs"]] == ["step"]
    assert content["environment"]["command"].startswith("python -m scripts.bench --policy")
    assert (tmp_path / "small-mixed.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "huge"], "'huge' is unknown; choose from small, medium"),
        (["--load", "1,x"], "'1,x' is not a list of numbers"),
        (["--load", "0"], "loads must be above 0"),
        (["--steps", "4"], "--steps needs --speeds or --device cuda"),
        (["--speeds", "--policy", "static"], "--policy and --speeds cannot be combined"),
        (["--speeds", "--gates"], "--gates and --speeds cannot be combined"),
    ],
)
def test_an_invalid_option_is_a_usage_error(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.bench
def test_step_level_batching_reaches_most_of_the_gates_limits() -> None:
    """Under two minutes: two seeds of 30 jobs, so limits are four fifths of the gates'."""
    comparison = load_comparison("small", make_settings())
    policies = ("sequential", "static", "step")
    runs = list(measure(comparison, policies, (1.5,), seeds=2, jobs=30, guidance="mixed"))
    gates = list(trace_gates(runs))
    assert len(gates) == 7
    assert [gate for gate in gates if gate.measured < 0.8 * gate.limit] == []
