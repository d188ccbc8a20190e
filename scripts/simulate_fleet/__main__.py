"""`python -m scripts.simulate_fleet`: replay a day of traffic over N replicas; prints what clients see."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
import numpy as np

from hypergen.errors import ConfigurationError
from scripts.simulate_fleet.arrivals import Arrivals, Day, make_arrivals
from scripts.simulate_fleet.costs import Traffic, read_traffic
from scripts.simulate_fleet.fleet import Fleet, Outcome, simulate

_ASSUMED = Path(__file__).with_name("assumed.yaml")
_COUNT = click.IntRange(1)
_ABOVE_0 = click.FloatRange(0, min_open=True)


@click.command(context_settings={"show_default": True, "max_content_width": 110})
@click.option("--replicas", type=_COUNT, default=1, help="replicas of one GPU, at least")
@click.option("--max-replicas", type=_COUNT, help="replicas at most; without it their number is fixed")
@click.option("--rate", type=_ABOVE_0, default=0.3, help="mean requests per second, without bursts")
@click.option("--peak", type=click.FloatRange(1, 2), default=1.6, help="busiest time over the mean")
@click.option("--bursts", type=click.FloatRange(0), default=12.0, help="bursts per day")
@click.option("--burst-factor", type=click.FloatRange(1), default=2.0, help="rate of a burst over the usual")
@click.option("--from-hour", type=click.FloatRange(0, 24), default=0.0, help="start of the simulated hours")
@click.option("--hours", type=click.FloatRange(1 / 60, 24), default=24.0, help="how many hours")
@click.option(
    "--models", type=click.Path(path_type=Path), default=_ASSUMED, help="mix and costs of the models"
)
@click.option("--max-batch-size", type=_COUNT, default=8, help="as the server's setting")
@click.option("--max-waiting", type=click.IntRange(0), default=100, help="waiting requests before 429")
@click.option("--target", type=_ABOVE_0, default=6.0, help="unfinished requests per replica to scale for")
@click.option(
    "--start", "start_s", type=click.FloatRange(0), default=180.0, help="seconds until a new replica serves"
)
@click.option(
    "--cooldown", "cooldown_s", type=click.FloatRange(0), default=600.0, help="seconds before replicas go"
)
@click.option("--seed", type=int, default=0, help="of the traffic")
def main(
    replicas: int,
    max_replicas: int | None,
    models: Path,
    seed: int,
    max_batch_size: int,
    max_waiting: int,
    target: float,
    start_s: float,
    cooldown_s: float,
    **day_options: float,
) -> None:
    """Simulate a day of requests over replicas of one GPU, behind a balancer with least connections."""
    day, traffic = Day(**day_options), read_traffic(models)
    fleet = Fleet(
        min_replicas=replicas,
        max_replicas=max(replicas, max_replicas or replicas),
        target=target,
        start_s=start_s,
        cooldown_s=cooldown_s,
        max_batch_size=max_batch_size,
        max_waiting=max_waiting,
    )
    started = time.process_time()
    arrivals = make_arrivals(day, traffic, seed)
    specs = list(traffic.models.values())
    outcome = simulate(
        arrivals,
        [spec.seconds_per_step(max_batch_size) for spec in specs],
        [spec.extra_steps for spec in specs],
        fleet,
        day.hours * 3600,
    )
    for name, value in report(arrivals, traffic, outcome, day):
        click.echo(f"{name:24} {value}")
    click.echo(f"Simulated in {time.process_time() - started:.1f} s of CPU time.", err=True)


def report(arrivals: Arrivals, traffic: Traffic, outcome: Outcome, day: Day) -> list[tuple[str, str]]:
    """Names and values of the printed lines."""
    arrived = arrivals.at_s.size
    rows = [
        ("requests", f"{arrived:,}, each {traffic.device_s:.2f} s of a GPU on average if it is alone"),
        ("busiest minute", f"{_busiest_minute(arrivals):,.1f} requests/s"),
        ("rejected (429)", f"{outcome.rejected:,} ({outcome.rejected / max(arrived, 1):.2%})"),
        ("wait", _percentiles(outcome.wait_s)),
        ("latency", _percentiles(outcome.latency_s)),
    ]
    for index, name in enumerate(traffic.models):
        rows.append((f"latency of {name}", _percentiles(outcome.latency_s[arrivals.model == index])))
    used = outcome.busy_s / outcome.gpu_s if outcome.gpu_s else 0.0
    return [
        *rows,
        ("images per forward pass", f"{outcome.images_per_forward:.2f}"),
        ("unfinished, at most", f"{outcome.most_unfinished:,}"),
        ("replicas, at most", f"{outcome.most_replicas:,}"),
        ("GPU hours", f"{outcome.gpu_s / 3600:,.1f} in {day.hours:g} h, {used:.0%} of them busy"),
        ("images per GPU hour", f"{outcome.served / outcome.gpu_s * 3600:,.0f}" if outcome.gpu_s else "-"),
    ]


def _busiest_minute(arrivals: Arrivals) -> float:
    return float(np.bincount((arrivals.at_s // 60).astype(int), minlength=1).max()) / 60


def _percentiles(seconds: np.ndarray) -> str:
    served = seconds[np.isfinite(seconds)]
    if not served.size:
        return "-"
    values = zip(
        ("p50", "p95", "p99", "max"), (*np.percentile(served, (50, 95, 99)), served.max()), strict=True
    )
    return ", ".join(f"{name} {value:.2f} s" for name, value in values)


if __name__ == "__main__":
    try:
        main()
    except ConfigurationError as error:
        sys.exit(f"Error: {error}")
