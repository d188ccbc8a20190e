"""LoRA files from PEFT: random weights for real layers, in the layouts of published files."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "upsamplers.0.conv")
EVERYTHING = (*ATTENTION, *CONVOLUTIONS, "ff.net.0.proj", "ff.net.2", "proj_in", "time_emb_proj")
TEXT = ("q_proj", "v_proj", "fc1")


def random_lora(
    module: Any, rank: int, targets: Sequence[str], seed: int, strength: float = 0.3, **config: Any
) -> dict[str, Tensor]:
    """PEFT's state dict of a new LoRA with random weights."""
    module = copy.deepcopy(module)
    module.add_adapter(LoraConfig(r=rank, target_modules=list(targets), **{"lora_alpha": rank, **config}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator) * strength / rank**0.5
            # DoRA's magnitudes must stay near the norms of the weights.
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else noise
    return get_peft_model_state_dict(module)


def save_lora(
    file: Path,
    pipeline: Any,
    *,
    rank: int = 4,
    targets: Sequence[str] = ATTENTION,
    text: Sequence[str] = (),
    seed: int = 0,
    alpha: float | None = None,
    **config: Any,
) -> Path:
    """A file in diffusers' layout; with `alpha`, its settings are in the header."""
    settings: dict[str, Any] = {}
    if alpha is not None:
        config["lora_alpha"] = alpha
        settings = {f"unet.{key}": value for key, value in _settings(rank, targets, config).items()}
    state = {f"unet.{k}": v for k, v in random_lora(pipeline.unet, rank, targets, seed, **config).items()}
    if text:
        encoder = random_lora(pipeline.text_encoder, rank, text, seed, 1.0)
        state |= {f"text_encoder.{key}": value for key, value in encoder.items()}
    header = {"lora_adapter_metadata": json.dumps(settings)} if settings else None
    save_file({key: value.contiguous() for key, value in state.items()}, file, header)
    return file


def _settings(rank: int, targets: Sequence[str], config: dict[str, Any]) -> dict[str, Any]:
    return {"r": rank, "target_modules": list(targets), **config}


def save_kohya(file: Path, pipeline: Any, *, rank: int, targets: Sequence[str], alpha: float) -> Path:
    """A file in the layout of Kohya's scripts, with an `alpha` tensor per layer."""
    state = {f"unet.{k}": v for k, v in random_lora(pipeline.unet, rank, targets, 5).items()}
    kohya = {key: value.contiguous() for key, value in convert_state_dict_to_kohya(state).items()}
    for key in [key for key in kohya if key.endswith("lora_down.weight")]:
        kohya[key.replace("lora_down.weight", "alpha")] = torch.tensor(alpha)
    save_file(kohya, file)
    return file


def stock_image(pipeline: Any, loras: Sequence[tuple[Path, float]], **call: Any) -> Any:
    """The image of a diffusers pipeline with these LoRAs, loaded as in its documentation."""
    for file, _ in loras:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=file.stem)
    pipeline.set_adapters([file.stem for file, _ in loras], [weight for _, weight in loras])
    try:
        return pipeline(**call).images[0]
    finally:
        pipeline.unload_lora_weights()
