"""What one request costs when nobody else is there, against a stock call."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from scripts.bench.jobs import Job
from scripts.bench.policies import Policy
from scripts.bench.traces import Contest

_STEPS = 20


def alone_over_stock(contest: Contest, guidance_scale: float, pairs: int) -> float:
    """CPU time of one request of 20 steps in the engine over that of a stock call, median of interleaved
    pairs.
    """
    ratios = list(_ratios(contest, guidance_scale, pairs + 1))
    return statistics.median(ratios[1:])  # the first calls of a process are slower


def _ratios(contest: Contest, guidance_scale: float, pairs: int) -> Iterator[float]:
    for number in range(pairs):
        job = Job(number, 0, _STEPS, guidance_scale)
        # Who goes first changes, because the second finds warm caches.
        order = [contest.step, contest.sequential]
        seconds = {id(policy): _seconds(contest, policy, job) for policy in order[:: 1 if number % 2 else -1]}
        yield seconds[id(contest.step)] / seconds[id(contest.sequential)]


def _seconds(contest: Contest, policy: Policy, job: Job) -> float:
    started = contest.clock()
    policy.serve([job], 0)
    return contest.clock() - started


def same_bytes_alone(contest: Contest, trace: Sequence[Job], count: int = 10) -> tuple[int, int]:
    """Draw jobs of the latest run of `step` again, one by one: how many files are equal, of how many."""
    in_the_crowd = dict(contest.step.files)
    chosen = trace[:: max(1, len(trace) // count)]
    equal = 0
    for job in chosen:
        contest.step.serve([job], 0)
        equal += contest.step.files[job.number] == in_the_crowd[job.number]
    return equal, len(chosen)
