"""Pictures, masks, control models and LoRAs with SDXL: what diffusers' pipelines of that family draw."""

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
from tests.conditioning.test_controlnet import random_control_model
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
    # An invisible watermark would be drawn if its library were there.
    return {**pipeline.components, "add_watermarker": False}


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(base)
    return save_lora(tmp_path_factory.mktemp("loras") / "style.safetensors", pipeline)


@pytest.fixture(scope="module")
def family(base: Path, parts: dict[str, Any], lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    control = tmp_path_factory.mktemp("control")
    random_control_model(parts, 1).save_pretrained(control)
    return loading.load(base, make_settings(controlnet={"edges": str(control)}, lora=[f"style={lora}"]))


def test_pictures_masks_and_control_models_are_those_of_the_stock_pipelines(
    family: Any, parts: dict[str, Any]
) -> None:
    sent, mask = sample_image(), left_half_mask()
    control = ControlInput(model="edges", image=sample_image(seed=4), scale=0.8, start=0.0, end=0.6)
    text = make_request(**_STEPS)
    from_picture = make_request(**_STEPS, image=sent, strength=0.6)
    inside = make_request(**_STEPS, image=sent, mask=mask, strength=0.9)
    controlled = make_request(**_STEPS, control=control)
    size = {"width": 64, "height": 64}
    stock = {
        text.id: generate_with_diffusers(StableDiffusionXLPipeline(**parts), text, **size),
        from_picture.id: generate_with_diffusers(
            StableDiffusionXLImg2ImgPipeline(**parts), from_picture, image=to_pillow(sent), strength=0.6
        ),
        controlled.id: generate_with_diffusers(
            StableDiffusionXLControlNetPipeline(**parts, controlnet=family.control_models["edges"]),
            controlled,
            image=to_pillow(control.image),
            controlnet_conditioning_scale=0.8,
            control_guidance_end=0.6,
            **size,
        ),
        inside.id: generate_with_diffusers(
            StableDiffusionXLInpaintPipeline(**parts),
            inside,
            image=to_pillow(sent),
            mask_image=to_pillow(mask),
            strength=0.9,
            **size,
        ),
    }
    assert_same(generate_alone(family, inside), stock[inside.id])
    crowd = InlineEngine(family)
    crowd.run(text, from_picture, controlled, inside)
    for request in (text, from_picture, controlled):
        assert_same(generate_alone(family, request), stock[request.id])
        assert_same(pixels_of(crowd.data(request)), stock[request.id])
    kept = pixels_of(crowd.data(inside))[:, 32:]
    assert (kept == np.asarray(to_pillow(sent))[:, 32:]).all()


def test_a_lora_draws_what_diffusers_draws_with_it(base: Path, family: Any, lora: Path) -> None:
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
    crowd = InlineEngine(family)
    crowd.probe_shapes(request, plain)
    crowd.run(request, plain)
    assert crowd.images[request.id][0].shared_forwards > 0
    assert_same(pixels_of(crowd.data(request)), stock)
    assert crowd.data(request) != crowd.data(plain)
