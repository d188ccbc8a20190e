"""The layouts of LoRA files: what the names of their tensors and their metadata mean. No tensors are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

# The part of a layer -> the endings of its tensors' names, in the layouts of PEFT, Kohya's scripts, diffusers
# before PEFT, XLabs, ComfyUI and LyCORIS.
_ENDINGS = {
    "down": r"\.lora_A(?:\.default)?(?:\.weight)?|\.lora_down(?:\.weight)?"
    r"|(?:[._]lora|\.lora_linear_layer)?\.down\.weight",
    "up": r"\.lora_B(?:\.default)?(?:\.weight)?|\.lora_up(?:\.weight)?"
    r"|(?:[._]lora|\.lora_linear_layer)?\.up\.weight",
    "mid": r"\.lora_mid(?:\.weight)?",
    "up_bias": r"\.lora_B(?:\.default)?\.bias",
    "alpha": r"\.alpha",
    "magnitude": r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?",
    "dora_scale": r"\.dora_scale",
    "diff": r"\.diff|\.w_norm",
    "diff_bias": r"\.diff_b|\.b_norm",
    **{name: rf"\.{name}" for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{name: rf"\.{name}" for name in ("hada_t1", "hada_t2", "lokr_t2", "lokr_w1", "lokr_w2")},
    **{name: rf"\.{name}" for name in ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")},
}
_NAME = re.compile(
    "(?P<layer>.+?)(?:" + "|".join(f"(?P<{part}>{ending})" for part, ending in _ENDINGS.items()) + ")"
)
# Of A1111 and OneTrainer: textual inversions inside a LoRA file, and their parts.
_EMBEDDING = re.compile(r"bundle_emb\.(?P<name>.+?)(?:\.(?P<part>string_to_param\.\*|[^.]+))?")
_PEFT = "base_model.model."

# Metadata that names the base model, and the starts of its values.
_BASE_MODEL_KEYS = ("ss_base_model_version", "modelspec.architecture")
_BASE_MODELS = {
    "sd_v1": "sd 1.x",
    "sd_1": "sd 1.x",
    "stable-diffusion-v1": "sd 1.x",
    "sd_v2": "sd 2.x",
    "sd_2": "sd 2.x",
    "stable-diffusion-v2": "sd 2.x",
    "sdxl": "sdxl",
    "stable-diffusion-xl": "sdxl",
    "sd3": "sd3",
    "stable-diffusion-3": "sd3",
    "flux1": "flux",
    "flux.1": "flux",
    "flux-1": "flux",
}


class TensorName(NamedTuple):
    """A tensor of a LoRA file: the layer as the file calls it, and the part of the layer's change."""

    layer: str
    part: str


class BaseModel(NamedTuple):
    """What a file's metadata say of its base model.

    Attributes:
        family: as in `FamilySpec.lora_text_widths`, or the name of a family.
    """

    key: str
    value: str
    family: str


def parse_name(name: str) -> TensorName | None:
    """Split the name of a tensor; None: it is no part of a LoRA in any known layout."""
    match = _NAME.fullmatch(name)
    return None if match is None or match.lastgroup is None else TensorName(match["layer"], match.lastgroup)


def parse_embedding(name: str) -> tuple[str, str] | None:
    """Name and part, such as `clip_l`, of a textual inversion that is bundled in a LoRA file."""
    match = _EMBEDDING.fullmatch(name)
    return None if match is None else (match["name"], (match["part"] or "emb_params").removesuffix(".*"))


def is_peft(name: str) -> bool:
    """Whether PEFT wrote the tensor; its configuration is in `adapter_config.json` then."""
    return name.startswith(_PEFT)


def base_model(metadata: Mapping[str, str]) -> BaseModel | None:
    """The base model in a file's metadata; None: not given, or unknown."""
    for key in _BASE_MODEL_KEYS:
        value = metadata.get(key, "")
        for start, family in _BASE_MODELS.items():
            if value.lower().startswith(start):
                return BaseModel(key, value, family)
    return None
