"""Samplers and what they can do, for checks without torch; `denoising/schedulers.py` has their classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_SIGMAS = ("karras", "exponential", "beta")
_SPACINGS = ("sgm_uniform", "simple", "normal")
SCHEDULE_NAMES = (*_SIGMAS, *_SPACINGS)


@dataclass(frozen=True)
class SamplerInfo:
    """
    Attributes:
        scheduler: its class in diffusers.
        schedules: that it can have.
        min_steps: the fewest steps.
        zero_terminal_snr: it can be told that the model was trained so.
    """

    scheduler: str
    schedules: tuple[str, ...] = ()
    min_steps: int = 1
    zero_terminal_snr: bool = False


_DPM_MULTISTEP = SamplerInfo("DPMSolverMultistepScheduler", SCHEDULE_NAMES, zero_terminal_snr=True)
_DPM_SINGLESTEP = SamplerInfo("DPMSolverSinglestepScheduler", _SIGMAS, min_steps=2)
SAMPLERS = {
    "ddim": SamplerInfo("DDIMScheduler", _SPACINGS, zero_terminal_snr=True),
    "ddpm": SamplerInfo("DDPMScheduler", _SPACINGS, zero_terminal_snr=True),
    "deis": SamplerInfo("DEISMultistepScheduler", SCHEDULE_NAMES),
    "dpmpp_2m": _DPM_MULTISTEP,
    "dpmpp_2m_sde": _DPM_MULTISTEP,
    "dpmpp_3m": _DPM_MULTISTEP,
    "dpmpp_3m_sde": _DPM_MULTISTEP,
    "dpmpp_sde": _DPM_SINGLESTEP,
    "dpmpp_singlestep": _DPM_SINGLESTEP,
    "euler": SamplerInfo("EulerDiscreteScheduler", SCHEDULE_NAMES, zero_terminal_snr=True),
    "euler_a": SamplerInfo("EulerAncestralDiscreteScheduler", _SPACINGS, zero_terminal_snr=True),
    "heun": SamplerInfo("HeunDiscreteScheduler", SCHEDULE_NAMES),
    "kdpm2": SamplerInfo("KDPM2DiscreteScheduler", SCHEDULE_NAMES),
    "kdpm2_a": SamplerInfo("KDPM2AncestralDiscreteScheduler", SCHEDULE_NAMES),
    "lcm": SamplerInfo("LCMScheduler", zero_terminal_snr=True),
    "lms": SamplerInfo("LMSDiscreteScheduler", SCHEDULE_NAMES),
    "pndm": SamplerInfo("PNDMScheduler", _SPACINGS),
    "tcd": SamplerInfo("TCDScheduler", zero_terminal_snr=True),
    "unipc": SamplerInfo("UniPCMultistepScheduler", SCHEDULE_NAMES, zero_terminal_snr=True),
}
# Of flow matching models, and of those with EDM's preconditioning.
FLOW_SAMPLERS = {
    "euler": SamplerInfo("FlowMatchEulerDiscreteScheduler", _SIGMAS),
    "heun": SamplerInfo("FlowMatchHeunDiscreteScheduler"),
}
EDM_SAMPLERS = {
    "dpmpp_2m": SamplerInfo("EDMDPMSolverMultistepScheduler"),
    "dpmpp_2m_sde": SamplerInfo("EDMDPMSolverMultistepScheduler"),
    "euler": SamplerInfo("EDMEulerScheduler"),
}


def find_info(samplers: Mapping[str, SamplerInfo], name: str) -> SamplerInfo | None:
    """The sampler of a name that may end in a schedule, such as `dpmpp_2m_karras`; None: there is none."""
    for sampler, info in samplers.items():
        if name == sampler or name in (f"{sampler}_{schedule}" for schedule in info.schedules):
            return info
    return None


def unknown_scheduler(name: str, samplers: Mapping[str, object]) -> str:
    known = ", ".join(samplers)
    return (
        f"must be one of {known}, not '{name}'; some of them can have a schedule after the name, such as "
        "_karras."
    )


def check_name(name: str) -> None:
    """
    Raises:
        ValueError: no model has this sampler.
    """
    if all(find_info(samplers, name) is None for samplers in (SAMPLERS, FLOW_SAMPLERS)):
        known = ", ".join(SAMPLERS)
        raise ValueError(f"must be one of {known}, some with a schedule, such as dpmpp_2m_karras")
