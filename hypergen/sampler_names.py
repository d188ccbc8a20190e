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
# Of flow matching models, and of those with EDM's preconditioning.
FLOW_SAMPLER_NAMES = ("euler", "heun")
EDM_SAMPLER_NAMES = ("dpmpp_2m", "dpmpp_2m_sde", "euler")
# The fewest steps, of samplers that need more than one.
MIN_STEPS = {"dpmpp_sde": 2, "dpmpp_singlestep": 2}
SCHEDULE_NAMES = ("karras", "exponential", "beta", "sgm_uniform", "simple", "normal")


def names_for(scheduler_class: str) -> tuple[str, ...]:
    """The samplers that a model may have, by the class of the scheduler that it was published with."""
    if scheduler_class.startswith("FlowMatch"):
        return FLOW_SAMPLER_NAMES
    return EDM_SAMPLER_NAMES if scheduler_class.startswith("EDM") else SAMPLER_NAMES


def check_name(name: str) -> None:
    """
    Raises:
        ValueError: no model has this sampler.
    """
    endings = ("", *(f"_{schedule}" for schedule in SCHEDULE_NAMES))
    if not any(name == f"{sampler}{ending}" for sampler in SAMPLER_NAMES for ending in endings):
        known = ", ".join(SAMPLER_NAMES)
        raise ValueError(f"must be one of {known}, some with a schedule, such as dpmpp_2m_karras")
