"""Names of samplers with and without schedules, for tests over all of them, and what they are made from."""

from __future__ import annotations

from typing import Any

from hypergen.denoising.schedulers import FLOW_SAMPLERS, SAMPLERS

# The configuration of Stable Diffusion's scheduler.
STABLE_DIFFUSION: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

WITH_SCHEDULES = [(name, schedule) for name, sampler in SAMPLERS.items() for schedule in sampler.schedules]
ALL_NAMES = [*SAMPLERS, *(f"{name}_{schedule}" for name, schedule in WITH_SCHEDULES)]
ALL_FLOW_NAMES = [
    *FLOW_SAMPLERS,
    *(f"{name}_{schedule}" for name, sampler in FLOW_SAMPLERS.items() for schedule in sampler.schedules),
]
# One schedule of each kind, and each sampler that is only interesting with one.
SOME_NAMES = [
    *SAMPLERS,
    "dpmpp_2m_karras",
    "dpmpp_2m_sde_exponential",
    "dpmpp_3m_sde_karras",
    "dpmpp_sde_karras",
    "euler_a_sgm_uniform",
    "heun_beta",
    "kdpm2_a_karras",
    "lms_karras",
    "unipc_normal",
]
