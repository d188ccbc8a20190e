"""Aliases of sampler names in other programs: "DPM++ 2M Karras", "Euler a", "k_heun", "UniPC"."""

from __future__ import annotations

import re

_ALIASES = {
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


_MAX_CHARACTERS = 100  # the rest is ignored


def public_name(name: str) -> str:
    """Our name for a sampler; an unknown name is only normalized."""
    normalized = "_".join(
        re.findall(r"[a-z0-9]+", name[:_MAX_CHARACTERS].lower().replace("++", "pp"))
    ).removeprefix("k_")
    return _ALIASES.get(normalized, normalized)
