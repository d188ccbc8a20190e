"""The settings of an image as A1111's infotext, which image browsers and Civitai read.

Source: `create_infotext` and `parse_generation_parameters` in stable-diffusion-webui of AUTOMATIC1111, commit
82a973c; `Schedule type` is a field since its version 1.9, `Distilled CFG Scale` is Forge's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from hypergen import __version__

SAMPLER_NAMES = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "deis": "DEIS",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m": "DPM++ 3M",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_singlestep": "DPM++ 2S",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "kdpm2": "DPM2",
    "kdpm2_a": "DPM2 a",
    "lcm": "LCM",
    "lms": "LMS",
    "pndm": "PLMS",
    "tcd": "TCD",
    "unipc": "UniPC",
}
SCHEDULE_NAMES = {
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
    "sgm_uniform": "SGM Uniform",
    "simple": "Simple",
    "normal": "Normal",
}
# Readers split the text here, some of them also within a line.
_SEPARATORS = re.compile("(negative prompt|steps):", re.IGNORECASE)


def infotext(settings: Mapping[str, Any]) -> str:
    """The text of the settings that `hypergen.images.encoding` writes as JSON.

    In prompts, a separator of the text gets a space before its colon, which is the same to CLIP, so that a
    prompt cannot pass for other settings.
    """
    loras = "".join(f" <lora:{name}:{_number(weight)}>" for name, weight in settings.get("loras", {}).items())
    lines = [_escaped(settings["prompt"]) + loras]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {_escaped(settings['negative_prompt'])}")
    values = {name: value for name, value in _values(settings).items() if value is not None}
    lines.append(", ".join(f"{name}: {_quoted(_number(value))}" for name, value in values.items()))
    # A zero would end the text; a lone surrogate has no encoding.
    text = "\n".join(lines).replace("\0", "\ufffd")
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _values(settings: Mapping[str, Any]) -> dict[str, Any]:
    sampler, schedule = _sampler(settings["sampler"])
    guidance_scale, true_cfg_scale = settings["guidance_scale"], settings.get("true_cfg_scale")
    return {
        "Steps": settings["num_inference_steps"],
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": guidance_scale if true_cfg_scale is None else true_cfg_scale,
        "Distilled CFG Scale": None if true_cfg_scale is None else guidance_scale,
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": settings["model"],
        "Denoising strength": settings.get("strength"),
        "Clip skip": settings.get("clip_skip"),
        "Version": f"HyperGen {__version__}",
    }


def _sampler(name: str | None) -> tuple[str | None, str | None]:
    """A1111's names of the sampler and its schedule; None: the model's own scheduler."""
    if name is None:
        return None, None
    for schedule, shown in SCHEDULE_NAMES.items():
        if name.endswith(f"_{schedule}"):
            sampler = name.removesuffix(f"_{schedule}")
            return SAMPLER_NAMES.get(sampler, sampler), shown
    return SAMPLER_NAMES.get(name, name), "Automatic"


def _escaped(prompt: str) -> str:
    return _SEPARATORS.sub(r"\1 :", prompt)


def _number(value: object) -> str:
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:"\r\n]', value) else value
