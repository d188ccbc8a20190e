"""Names of samplers and schedules, for checks without torch; `denoising/schedulers.py` has the classes."""

from __future__ import annotations

# Of all families together.
SAMPLER_NAMES = (
    "ddim",
    "ddpm",
    "deis",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "dpmpp_singlestep",
    "euler",
    "euler_a",
    "heun",
    "kdpm2",
    "kdpm2_a",
    "lcm",
    "lms",
    "pndm",
    "tcd",
    "unipc",
)
SCHEDULE_NAMES = ("karras", "exponential", "beta", "sgm_uniform", "simple", "normal")


def check_name(name: str) -> None:
    """
    Raises:
        ValueError: no model has this sampler.
    """
    endings = ("", *(f"_{schedule}" for schedule in SCHEDULE_NAMES))
    if not any(name == f"{sampler}{ending}" for sampler in SAMPLER_NAMES for ending in endings):
        known = ", ".join(SAMPLER_NAMES)
        raise ValueError(f"must be one of {known}, some with a schedule, such as dpmpp_2m_karras")
