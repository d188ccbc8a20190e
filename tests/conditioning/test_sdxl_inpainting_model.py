"""SDXL trained for inpainting, nine input channels, in the three forms in which people have it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DiffusionPipeline, StableDiffusionXLInpaintPipeline

from hypergen.model_store.diffusers_layout import CHECKPOINT, PIPELINE_FILE
from hypergen.models import loading
from hypergen.request import InputImage
from tests.support.checkpoint_layouts import with_fields
from tests.support.diffusers_edits import (
    assert_same,
    generate_with_diffusers,
    left_half_mask,
    pixels_of,
    sample_image,
    to_pillow,
)
from tests.support.model_folders import error_message
from tests.support.original_layout import save_original
from tests.support.small_models import save_sdxl
from tests.support.sync_engine import InlineEngine, generate_alone, make_request, make_settings

_STEPS = {"num_inference_steps": 5, "guidance_scale": 5.0, "negative_prompt": "blurred"}
_EVERYTHING = InputImage(64, 64, b"\xff" * 64 * 64)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the text-to-image pipeline."""
    return save_sdxl(tmp_path_factory.mktemp("models") / "sdxl-inpainting", in_channels=9)


@pytest.fixture(scope="module")
def stock(plain: Path) -> Any:
    pipeline: Any = DiffusionPipeline.from_pretrained(plain)
    return StableDiffusionXLInpaintPipeline(**pipeline.components, add_watermarker=False)


def _folder(form: str, plain: Path, stock: Any, folder: Path) -> Path:
    if form == "plain folder":
        return plain
    if form == "folder":
        stock.save_pretrained(folder)
        return folder
    # One file, with the configuration of a text-to-image model.
    shutil.copytree(save_sdxl(folder.with_name("base")), folder)
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        next((folder / component).glob("*.safetensors")).unlink()
    save_original(stock, folder / CHECKPOINT)
    return folder


@pytest.mark.parametrize("form", ["plain folder", "folder", "one file"])
def test_edits_equal_diffusers(form: str, plain: Path, stock: Any, tmp_path: Path) -> None:
    family: Any = loading.load(_folder(form, plain, stock, tmp_path / "model"), make_settings())
    image, mask = sample_image(), left_half_mask()
    requests = [
        make_request(**_STEPS, image=image, mask=mask, strength=1.0),
        make_request(**_STEPS, image=image, mask=mask, strength=0.6, sampler="euler_a"),
        make_request(**_STEPS, image=image, strength=0.6),
    ]
    batched = InlineEngine(family)
    batched.run(*requests)
    for request in requests:
        expected = generate_with_diffusers(
            stock,
            request,
            image=to_pillow(image),
            mask_image=to_pillow(request.mask or _EVERYTHING),
            strength=request.strength,
            width=64,
            height=64,
        )
        generated = slice(0, 32) if request.mask else slice(0, 64)  # the rest is the input image
        assert_same(generate_alone(family, request)[:, generated], expected[:, generated])
        assert_same(pixels_of(batched.data(request))[:, generated], expected[:, generated])


def test_without_an_image_it_generates_one(plain: Path) -> None:
    image = generate_alone(loading.load(plain, make_settings()), make_request(**_STEPS))
    assert np.ptp(image) > 0


def test_other_numbers_of_channels_are_refused(tmp_path: Path) -> None:
    folder = save_sdxl(tmp_path / "pix2pix", in_channels=8)
    message = error_message(loading.load, folder, make_settings())
    assert "8 input channels ('conv_in.weight')" in message


def test_a_score_of_refiners_is_refused(tmp_path: Path) -> None:
    folder = with_fields(save_sdxl, PIPELINE_FILE, requires_aesthetics_score=True)(tmp_path / "model")
    assert "requires_aesthetics_score" in error_message(loading.load, folder, make_settings())
