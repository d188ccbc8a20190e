"""Sampler names as other programs write them: "DPM++ 2M Karras", "Euler a", "k_heun", "UniPC"."""

from __future__ import annotations

import re

_SAME = {
    "dpm2": "kdpm2",
    "dpm_2": "kdpm2",
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "dpmpp_sde_gpu": "dpmpp_sde",
    "euler_ancestral": "euler_a",
    "flow_match_euler": "euler",
    "flow_match_heun": "heun",
    "plms": "pndm",
    "uni_pc": "unipc",
}


_LONGEST = 100  # letters; what is longer is no name


def public_name(name: str) -> str:
    """Our name for a sampler; what is unknown comes back in our way of writing."""
    plain = "_".join(re.findall(r"[a-z0-9]+", name[:_LONGEST].lower().replace("++", "pp"))).removeprefix("k_")
    return _SAME.get(plain, plain)
