"""The job list: requests as they arrive, the same for every policy that is measured."""

from __future__ import annotations

import random
from dataclasses import dataclass

STEPS = (4, 8, 15, 20, 25, 30)
SHORT_STEPS = 8
GUIDANCE_SCALES = (3.0, 5.0, 7.5)
ONE_GUIDANCE_SCALE = (5.0,)


@dataclass(frozen=True)
class Job:
    """One picture that somebody wants.

    Attributes:
        waited_for: when it arrives, in mean times between two arrivals; a rate turns it into seconds.
    """

    number: int
    waited_for: float
    num_inference_steps: int
    guidance_scale: float

    @property
    def prompt(self) -> str:
        """Each job has its own, so that remembered prompts help nobody."""
        return f"picture {self.number}"

    @property
    def short(self) -> bool:
        return self.num_inference_steps <= SHORT_STEPS


def job_list(count: int, seed: int, guidance_scales: tuple[float, ...] = GUIDANCE_SCALES) -> list[Job]:
    """Poisson arrivals at rate 1, with steps and guidance drawn evenly."""
    rng = random.Random(seed)
    jobs: list[Job] = []
    now = 0.0
    for number in range(count):
        now += rng.expovariate(1)
        jobs.append(Job(number, now, rng.choice(STEPS), rng.choice(guidance_scales)))
    return jobs
