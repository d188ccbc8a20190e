"""Prompts are encoded, and LoRAs loaded, once for all images of a request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline

from hypergen.models import loading
from tests.support.lora_files import TEXT, save_lora
from tests.support.small_models import save_flux, save_refiner, save_sd3, save_sdxl
from tests.support.sync_engine import InlineEngine, make_request, make_settings


@pytest.fixture
def load(sd_folder: Path, tmp_path: Path) -> Callable[[str], Any]:
    """Loads a family without caches for prompts and LoRAs."""

    def load(name: str) -> Any:
        changes: dict[str, Any] = {"prompt_cache_mb": 0, "lora_cache_mb": 0}
        if name == "sd":
            pipeline: Any = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
            style = save_lora(tmp_path / "style.safetensors", pipeline, text=TEXT)
            return loading.load(sd_folder, make_settings(lora=[f"style={style}"], **changes))
        if name == "sdxl":
            base = save_sdxl(tmp_path / "base")
            changes["refiner"] = str(save_refiner(tmp_path / "refiner", base))
            return loading.load(base, make_settings(**changes))
        save = {"sd3": save_sd3, "flux": save_flux}[name]
        return loading.load(save(tmp_path), make_settings(**changes))

    return load


_CHANGES: dict[str, dict[str, Any]] = {
    "sd": {"loras": (("style", 0.8),)},
    "sdxl": {"prompt_2": "a dog", "enable_refiner": True},
    "sd3": {"prompt_2": "a dog"},
    "flux": {"prompt_2": "a dog", "true_cfg_scale": 2.0},
}


@pytest.mark.parametrize("name", _CHANGES)
def test_prompts_of_a_request_are_encoded_once(name: str, load: Callable[[str], Any]) -> None:
    changes = {"negative_prompt": "a bird", "num_inference_steps": 6, **_CHANGES[name]}
    several = make_request(n=2, **changes)
    engine = InlineEngine(family := load(name))
    encode_prompts, encoded = family.encode_prompts, list[str]()

    def record(request: Any, loras: Any) -> Any:
        encoded.append(request.id)
        return encode_prompts(request, loras)

    family.encode_prompts = record
    engine.run(several)
    family.encode_prompts = encode_prompts
    assert encoded == [several.id]
    for index in range(2):
        alone = InlineEngine(family)
        alone.run(single := make_request(seed=several.seed + index, **changes))
        assert engine.data(several, index) == alone.data(single)
