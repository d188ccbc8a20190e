"""The job list: requests with arrival times, the same for every policy."""

from __future__ import annotations

import random
from dataclasses import dataclass

STEPS = (4, 8, 15, 20, 25, 30)
SHORT_STEPS = 8
GUIDANCE_SCALES = (3.0, 5.0, 7.5)
ONE_GUIDANCE_SCALE = (5.0,)


@dataclass(frozen=True)
class Job:
    """A request for one image.

    Attributes:
        arrival: arrival time in mean intervals between two arrivals; multiply by an interval for seconds.
    """

    number: int
    arrival: float
    num_inference_steps: int
    guidance_scale: float

    @property
    def prompt(self) -> str:
        """Different for each job, so that a prompt cache has no effect."""
        return f"picture {self.number}"

    @property
    def short(self) -> bool:
        return self.num_inference_steps <= SHORT_STEPS


def job_list(count: int, seed: int, guidance_scales: tuple[float, ...] = GUIDANCE_SCALES) -> list[Job]:
    """Poisson arrivals at rate 1; steps and guidance scales are sampled uniformly."""
    rng = random.Random(seed)
    jobs: list[Job] = []
    now = 0.0
    for number in range(count):
        now += rng.expovariate(1)
        jobs.append(Job(number, now, rng.choice(STEPS), rng.choice(guidance_scales)))
    return jobs
