"""The cost of a single request compared to a diffusers call."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from scripts.bench.jobs import Job
from scripts.bench.policies import Policy
from scripts.bench.traces import Comparison

_STEPS = 20


def single_request_ratio(comparison: Comparison, guidance_scale: float, pairs: int) -> float:
    """CPU time of one request of 20 steps in the engine divided by that of a diffusers call.

    The median over interleaved pairs.
    """
    ratios = list(_ratios(comparison, guidance_scale, pairs + 1))
    return statistics.median(ratios[1:])  # the first calls of a process are slower


def _ratios(comparison: Comparison, guidance_scale: float, pairs: int) -> Iterator[float]:
    for number in range(pairs):
        job = Job(number, 0, _STEPS, guidance_scale)
        # The order alternates, because the second one has warm caches.
        order = [comparison.step, comparison.sequential]
        seconds = {
            id(policy): _seconds(comparison, policy, job) for policy in order[:: 1 if number % 2 else -1]
        }
        yield seconds[id(comparison.step)] / seconds[id(comparison.sequential)]


def _seconds(comparison: Comparison, policy: Policy, job: Job) -> float:
    started = comparison.clock()
    policy.run([job], 0)
    return comparison.clock() - started


def same_bytes_alone(comparison: Comparison, trace: Sequence[Job], count: int = 10) -> tuple[int, int]:
    """Run jobs of the latest run of `step` again, one by one: number of equal files, number of jobs."""
    batched_files = dict(comparison.step.files)
    sampled = trace[:: max(1, len(trace) // count)]
    equal = 0
    for job in sampled:
        comparison.step.run([job], 0)
        equal += comparison.step.files[job.number] == batched_files[job.number]
    return equal, len(sampled)
