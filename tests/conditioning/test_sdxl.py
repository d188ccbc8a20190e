"""Img2img, inpainting, ControlNet and LoRA with SDXL against diffusers' pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from hypergen.models import loading
from hypergen.request import ControlInput
from tests.conditioning.test_controlnet import random_controlnet
from tests.support.diffusers_edits import (
    assert_same,
    generate_with_diffusers,
    left_half_mask,
    pixels_of,
    sample_image,
    to_pillow,
)
from tests.support.lora_files import save_lora, stock_image
from tests.support.small_models import save_sdxl
from tests.support.sync_engine import InlineEngine, generate_alone, make_request, make_settings

_STEPS = {"num_inference_steps": 4, "guidance_scale": 5.0, "negative_prompt": "blurred"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("models") / "small-sdxl")


@pytest.fixture(scope="module")
def parts(base: Path) -> dict[str, Any]:
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(base)
    # Images get an invisible watermark if its library is installed.
    return {**pipeline.components, "add_watermarker": False}


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(base)
    return save_lora(tmp_path_factory.mktemp("loras") / "style.safetensors", pipeline)


@pytest.fixture(scope="module")
def family(base: Path, parts: dict[str, Any], lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    control = tmp_path_factory.mktemp("control")
    random_controlnet(parts, 1).save_pretrained(control)
    return loading.load(base, make_settings(controlnet={"edges": str(control)}, lora=[f"style={lora}"]))


def test_img2img_inpainting_and_controlnet_equal_diffusers(family: Any, parts: dict[str, Any]) -> None:
    image, mask = sample_image(), left_half_mask()
    control = ControlInput(model="edges", image=sample_image(seed=4), scale=0.8, start=0.0, end=0.6)
    text = make_request(**_STEPS)
    img2img = make_request(**_STEPS, image=image, strength=0.6)
    inpaint = make_request(**_STEPS, image=image, mask=mask, strength=0.9)
    controlled = make_request(**_STEPS, control=control)
    size = {"width": 64, "height": 64}
    stock = {
        text.id: generate_with_diffusers(StableDiffusionXLPipeline(**parts), text, **size),
        img2img.id: generate_with_diffusers(
            StableDiffusionXLImg2ImgPipeline(**parts), img2img, image=to_pillow(image), strength=0.6
        ),
        controlled.id: generate_with_diffusers(
            StableDiffusionXLControlNetPipeline(**parts, controlnet=family.controlnets["edges"]),
            controlled,
            image=to_pillow(control.image),
            controlnet_conditioning_scale=0.8,
            control_guidance_end=0.6,
            **size,
        ),
        inpaint.id: generate_with_diffusers(
            StableDiffusionXLInpaintPipeline(**parts),
            inpaint,
            image=to_pillow(image),
            mask_image=to_pillow(mask),
            strength=0.9,
            **size,
        ),
    }
    assert_same(generate_alone(family, inpaint), stock[inpaint.id])
    batched = InlineEngine(family)
    batched.run(text, img2img, controlled, inpaint)
    for request in (text, img2img, controlled):
        assert_same(generate_alone(family, request), stock[request.id])
        assert_same(pixels_of(batched.data(request)), stock[request.id])
    kept = pixels_of(batched.data(inpaint))[:, 32:]
    assert (kept == np.asarray(to_pillow(image))[:, 32:]).all()


def test_a_lora_equals_diffusers(base: Path, family: Any, lora: Path) -> None:
    request = make_request(**_STEPS, loras=(("style", 0.7),))
    plain = make_request(**_STEPS)
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    stock = np.asarray(
        stock_image(
            pipeline,
            [(lora, 0.7)],
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            width=64,
            height=64,
            num_inference_steps=4,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(request.seed),
        )
    )
    assert_same(generate_alone(family, request), stock)
    batched = InlineEngine(family)
    batched.probe_shapes(request, plain)
    batched.run(request, plain)
    assert batched.images[request.id][0].shared_forwards > 0
    assert_same(pixels_of(batched.data(request)), stock)
    assert batched.data(request) != batched.data(plain)
