"""Images with LoRAs against diffusers, for several layouts and layer types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from hypergen.models import loading
from hypergen.models.family import Family
from tests.support.lora_files import ATTENTION, EVERYTHING, TEXT, save_kohya, save_lora, stock_image
from tests.support.sync_engine import generate_alone, make_request, make_settings

CASES = {
    "attention": ("attention",),
    "attention and convolutions": ("everything",),
    "two LoRAs": ("attention", "everything"),
    "a rank above max_lora_rank": ("large",),
    "text encoder": ("text",),
    "text encoder and attention": ("text", "attention"),
    "alpha in the header": ("alpha",),
    "DoRA": ("dora",),
    "Kohya": ("kohya",),
}


@pytest.fixture(scope="module")
def pipeline(sd_folder: Path) -> Any:
    stock: Any = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory, pipeline: Any) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    save_lora(folder / "attention.safetensors", pipeline, rank=4, seed=1)
    save_lora(folder / "everything.safetensors", pipeline, rank=8, targets=EVERYTHING, seed=2)
    save_lora(folder / "large.safetensors", pipeline, rank=48, targets=ATTENTION, seed=3)
    save_lora(folder / "text.safetensors", pipeline, rank=4, text=TEXT, seed=4)
    save_lora(folder / "alpha.safetensors", pipeline, rank=8, alpha=2, seed=6)
    save_lora(folder / "dora.safetensors", pipeline, rank=4, targets=("to_q", "conv1"), seed=7, use_dora=True)
    save_kohya(folder / "kohya.safetensors", pipeline, rank=8, targets=EVERYTHING, alpha=4)
    return folder


@pytest.fixture(scope="module")
def family(sd_folder: Path, loras: Path) -> Family:
    return loading.load(sd_folder, make_settings(lora_dir=[str(loras)]))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # of PEFT, about the second LoRA
@pytest.mark.parametrize("names", CASES.values(), ids=CASES.keys())
def test_an_image_equals_that_of_diffusers(
    family: Family, pipeline: Any, loras: Path, names: tuple[str, ...]
) -> None:
    weights = [0.8, 1.3][: len(names)]
    request = make_request(
        negative_prompt="blurred", loras=tuple(zip(names, weights, strict=True)), num_inference_steps=3
    )
    expected = stock_image(
        pipeline,
        [(loras / f"{name}.safetensors", weight) for name, weight in zip(names, weights, strict=True)],
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
    )
    image = generate_alone(family, request)
    difference = np.abs(image.astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.001
    base = generate_alone(family, make_request(negative_prompt="blurred", num_inference_steps=3))
    assert (np.abs(base.astype(int) - image.astype(int)) > 1).mean() > 0.02
