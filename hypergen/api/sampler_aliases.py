"""Names of samplers and schedules in other programs: "DPM++ 2M Karras", "Euler a", "dpmpp_2m_k", "UniPC"."""

from __future__ import annotations

import re

# Of A1111, ComfyUI, InvokeAI and k-diffusion, as far as `_normalized` does not make them equal to ours.
ALIASES = {
    "dpm2": "kdpm2",
    "dpm2_a": "kdpm2_a",
    "dpm_2": "kdpm2",
    "dpm_2_a": "kdpm2_a",
    "dpm_2_ancestral": "kdpm2_a",
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "dpmpp_2s": "dpmpp_singlestep",
    "dpmpp_3m_sde_gpu": "dpmpp_3m_sde",
    "dpmpp_sde_gpu": "dpmpp_sde",
    "euler_ancestral": "euler_a",
    "flow_match_euler": "euler",
    "flow_match_heun": "heun",
    "kdpm_2": "kdpm2",
    "kdpm_2_a": "kdpm2_a",
    "plms": "pndm",
    "uni_pc": "unipc",
    "uni_pc_bh2": "unipc",
}
# Name at the end of a sampler's -> our schedule. Longer ones first: `sgm_uniform` ends in `uniform`.
SCHEDULE_ALIASES = {
    "sgm_uniform": "sgm_uniform",
    "exponential": "exponential",
    "uniform": "normal",
    "karras": "karras",
    "normal": "normal",
    "simple": "simple",
    "beta": "beta",
    "k": "karras",
}
_MAX_CHARACTERS = 100  # the rest is ignored


def split_name(name: str) -> tuple[str, str | None]:
    """Our names of a sampler and, if the name has one, of its schedule; unknown names are only normalized."""
    sampler = _normalized(name).removeprefix("k_")
    for ending, schedule in SCHEDULE_ALIASES.items():
        if sampler.endswith(f"_{ending}"):
            return _public_name(sampler.removesuffix(f"_{ending}")), schedule
    return _public_name(sampler), None


def schedule_name(name: str) -> str | None:
    """Our name of a schedule; None: the sampler's own, which A1111 calls "Automatic"."""
    schedule = _normalized(name)
    return None if schedule == "automatic" else SCHEDULE_ALIASES.get(schedule, schedule)


def _public_name(sampler: str) -> str:
    return ALIASES.get(sampler, sampler)


def _normalized(name: str) -> str:
    return "_".join(re.findall(r"[a-z0-9]+", name[:_MAX_CHARACTERS].lower().replace("++", "pp")))
