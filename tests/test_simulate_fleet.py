"""The simulation of a fleet, against calculations by hand and by its own counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from hypergen.errors import ConfigurationError
from scripts.simulate_fleet.__main__ import main
from scripts.simulate_fleet.arrivals import Arrivals, Day, make_arrivals
from scripts.simulate_fleet.balancer import Balancer
from scripts.simulate_fleet.costs import read_traffic
from scripts.simulate_fleet.fleet import Fleet, Outcome, simulate
from scripts.simulate_fleet.replica import Replica

ASSUMED = Path(__file__).parents[1] / "scripts" / "simulate_fleet" / "assumed.yaml"
ONE = Fleet(min_replicas=1, max_replicas=1, max_batch_size=2, max_waiting=1)


def _run(
    at_s: list[float],
    steps: list[int],
    seconds: list[list[float]],
    fleet: Fleet,
    models: list[int] | None = None,
) -> Outcome:
    arrivals = Arrivals(np.array(at_s), np.array(models or [0] * len(at_s)), np.array(steps))
    return simulate(arrivals, seconds, [0.0] * len(seconds), fleet, duration_s=100.0)


def _traffic(rate: float, seed: int = 1, **fleet: int | float) -> Outcome:
    """An hour of the assumed models."""
    traffic = read_traffic(ASSUMED)
    arrivals = make_arrivals(Day(rate, from_hour=17, hours=1, bursts=48), traffic, seed)
    specs = traffic.models.values()
    settings = replace(Fleet(1, 1, start_s=60), **fleet)  # pyright: ignore[reportArgumentType]
    seconds = [spec.seconds_per_step(settings.max_batch_size) for spec in specs]
    return simulate(arrivals, seconds, [spec.extra_steps for spec in specs], settings, 3600)


def test_images_that_share_forward_passes_end_as_calculated_by_hand() -> None:
    # 5 steps of 1 s alone; 5 of 1.5 s together; the second ends with 5 of 1 s alone.
    outcome = _run([0.0, 5.0], [10, 10], [[0, 1.0, 1.5]], ONE)
    assert outcome.latency_s.tolist() == pytest.approx([12.5, 12.5])
    assert outcome.wait_s.tolist() == [0.0, 0.0]
    assert outcome.images_per_forward == pytest.approx(20 / 15)
    assert (outcome.busy_s, outcome.gpu_s) == (pytest.approx(17.5), 100.0)


def test_models_take_turns_and_requests_beyond_batch_and_queue_are_rejected() -> None:
    # Both models take a step in each round of 1 + 3 s. After 2 rounds the waiting request starts, for 2 more.
    outcome = _run([0.0, 0.0, 0.0, 0.0], [2, 4, 2, 2], [[0, 1.0, 2.0], [0, 3.0, 6.0]], ONE, [0, 1, 0, 0])
    assert outcome.latency_s[:2].tolist() == pytest.approx([8.0, 16.0])
    assert outcome.latency_s[2] == pytest.approx(16.0)
    assert outcome.wait_s[2] == pytest.approx(8.0)
    assert (outcome.served, outcome.rejected) == (3, 1)
    assert np.isnan(outcome.latency_s[3])


def test_the_replica_with_the_fewest_connections_is_chosen() -> None:
    balancer, replicas = Balancer(), [Replica([[0, 1.0]], 1) for _ in range(3)]
    assert balancer.choose() is None
    for replica, connections in zip(replicas, (2, 1, 3), strict=True):
        replica.connections = connections
        balancer.update(replica)
    assert balancer.choose() is replicas[1]
    balancer.remove(replicas[1])
    assert balancer.choose() is replicas[0]
    replicas[2].connections = 0
    balancer.update(replicas[2])
    assert balancer.choose() is replicas[2]


def test_the_autoscaler_adds_replicas_after_their_start_and_removes_them_after_the_cooldown() -> None:
    fleet = Fleet(
        1, 2, target=2, interval_s=10, start_s=20, cooldown_s=15, max_batch_size=1, max_waiting=10
    )  # one image at a time
    outcome = _run([0.0] * 4 + [31.0], [20] * 4 + [1], [[0, 1.0]], fleet)
    # Decided at 10 s, the second replica serves from 30 s on: it takes the last request.
    assert outcome.latency_s.tolist() == pytest.approx([20, 40, 60, 80, 1])
    assert outcome.most_replicas == 2
    # Two are wanted for the last time at 30 s. At 50 s that is longer ago than the cooldown.
    assert outcome.gpu_s == pytest.approx(100 + 40)


@pytest.mark.parametrize("seed", range(3))
def test_every_request_is_served_or_rejected(seed: int) -> None:
    for fleet in ({}, {"max_replicas": 4}, {"max_waiting": 0}):
        outcome = _traffic(1.5, seed, **fleet)
        assert outcome.served + outcome.rejected == outcome.latency_s.size > 4000
        assert outcome.rejected > 0
        served = np.isfinite(outcome.latency_s)
        assert (np.isfinite(outcome.wait_s) == served).all()
        assert (outcome.latency_s[served] > outcome.wait_s[served]).all()
        assert 1 <= outcome.images_per_forward <= 8
        assert 0 < outcome.busy_s <= outcome.gpu_s + 1e-6


def test_more_replicas_serve_more_and_sooner() -> None:
    outcomes = [_traffic(3.0, min_replicas=replicas, max_replicas=replicas) for replicas in (1, 4, 16)]
    served = [outcome.served for outcome in outcomes]
    assert served == sorted(served)
    assert served[0] < served[-1] == outcomes[-1].latency_s.size
    waits = [float(np.nanmean(outcome.wait_s)) for outcome in outcomes]
    assert waits == sorted(waits, reverse=True)


def test_an_autoscaled_fleet_costs_less_than_a_full_one_and_the_seed_decides_everything() -> None:
    scaled, full = _traffic(3.0, max_replicas=12), _traffic(3.0, min_replicas=12, max_replicas=12)
    assert scaled.gpu_s < full.gpu_s
    again = _traffic(3.0, max_replicas=12)
    assert np.array_equal(scaled.latency_s, again.latency_s, equal_nan=True)
    assert scaled.gpu_s == again.gpu_s
    assert _traffic(3.0, seed=2, max_replicas=12).latency_s.size != scaled.latency_s.size


def test_the_command_prints_its_figures_and_names_a_wrong_value(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--rate", "0.2", "--hours", "1"])
    assert result.exit_code == 0, result.output
    assert "rejected (429)           0 (0.00%)" in result.stdout
    assert "GPU hours                1.0 in 1 h" in result.stdout
    wrong = tmp_path / "models.yaml"
    wrong.write_text(ASSUMED.read_text(encoding="utf-8").replace("share: 0.6", "share: 0"))
    result = CliRunner().invoke(main, ["--models", str(wrong)])
    assert isinstance(result.exception, ConfigurationError)
    assert "'models.sdxl.share'" in str(result.exception)
