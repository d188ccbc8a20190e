"""Jobs through replicas that are killed at random: none is lost, none has two different results.

    python -m scripts.soak_fleet                                  # 10,000 jobs, 3 replicas, 50 kills
    python -m scripts.soak_fleet --jobs 30 --replicas 2 --kills 1 --steps 20

It starts a Redis and servers of the embedded model. The exit code is 1 if a promise is not kept.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

from rich.console import Console

from hypergen.errors import HyperGenError
from scripts.bench import report
from scripts.soak.phases import Figure
from scripts.soak_fleet.fleet import Fleet, run_fleet
from scripts.soak_fleet.load import Load


def kill_at_random(load: Load, kills: int, ended: threading.Event, killed: list[int]) -> None:
    """Kill a replica that runs jobs whenever another share of the jobs is done, and start it again."""
    fleet = load.fleet
    for number in range(1, kills + 1):
        while load.done < number * load.jobs // (kills + 1) and not ended.is_set():
            time.sleep(0.05)
        while not ended.is_set():
            replica = load.random.choice(fleet.replicas)
            others = [other for other in fleet.replicas if other is not replica]
            if replica.health().get("running") and any(other.is_healthy() for other in others):
                replica.kill()
                killed.append(fleet.replicas.index(replica) + 1)
                replica.start()
                break
            time.sleep(0.05)


def figures_of(load: Load, killed: list[int], taken_over: int, seconds: float, kills: int) -> list[Figure]:
    different = sum(len(digests) > 1 for digests in load.digests.values())
    seeds = sum(len(digests) > 1 for digests in load.by_seed.values())
    queue = load.fleet.redis.xlen("hypergen:queue")
    lost = "".join(f"; {job}: {why}" for job, why in list(load.bad.items())[:5])
    return [
        Figure("jobs sent", f"{load.sent} in {seconds:.0f} s", f"{load.jobs}", load.sent == load.jobs),
        Figure("jobs with a result", f"{load.done}", "all", load.done == load.sent),
        Figure("jobs lost or failed", f"{len(load.bad)}{lost}", "0", not load.bad),
        Figure("jobs with two different results", f"{different}", "0", not different),
        Figure(f"of {len(load.by_seed)} seeds, those with different bytes", f"{seeds}", "0", not seeds),
        Figure("replicas killed", f"{len(killed)}", f"{kills}", len(killed) == kills),
        Figure("jobs taken over", f"{taken_over}", "at least 1", bool(taken_over) or not kills),
        Figure("requests sent again", f"{load.sent_twice}", "", True),
        Figure("entries left in the queue", f"{queue}", "0", queue == 0),
    ]


def count_taken_over(fleet: Fleet) -> int:
    """Jobs that were delivered more than once; their records are still in Redis."""
    keys = list(fleet.redis.scan_iter("hypergen:job:*", count=1000))
    return sum(int(fleet.redis.hget(key, "deliveries") or 0) > 1 for key in keys)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--kills", type=int, help="of a replica at random; default: one for 200 jobs")
    parser.add_argument("--steps", type=int, default=2, help="of each job")
    parser.add_argument("--minutes", type=float, default=120, help="after which no more jobs are sent")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices")
    parser.add_argument("--folder", type=Path, help="for logs and models; default: a temporary one")
    options = parser.parse_args()
    kills = options.kills if options.kills is not None else max(1, options.jobs // 200)
    console = Console(soft_wrap=True)
    environment = report.environment(["python", "-m", "scripts.soak_fleet", *sys.argv[1:]])
    settings = (
        "--max-jobs",
        str(options.jobs + 1000),
        "--request-timeout",
        "86400",
        "--url-lifetime",
        "86400",
    )
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with run_fleet(folder, options.replicas, *settings, "--url-storage-mb", "4096") as fleet:
                started, ended = time.monotonic(), threading.Event()
                until = started + options.minutes * 60
                load = Load(fleet, options.jobs, options.steps, until, random.Random(options.seed))
                killed: list[int] = []
                killer = threading.Thread(target=kill_at_random, args=(load, kills, ended, killed))
                killer.start()
                try:
                    load.run()
                finally:
                    ended.set()
                    killer.join()
                seconds = time.monotonic() - started
                figures = figures_of(load, killed, count_taken_over(fleet), seconds, kills)
        except HyperGenError as error:
            sys.exit(f"Error: {error}")
    console.print(
        f"{environment['machine']}, {environment['date']}, `{environment['command']}`\n", highlight=False
    )
    console.print("| what | result | promised | |\n|---|---|---|---|", highlight=False)
    for figure in figures:
        mark = "" if figure.is_kept else "**not kept**"
        console.print(f"| {figure.what} | {figure.result} | {figure.promised} | {mark} |", highlight=False)
    return 0 if all(figure.is_kept for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
