"""FLUX.1 Fill against diffusers: edits with a mask, as a folder and as one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxFillPipeline
from safetensors.torch import save_file

from hypergen.model_store import store
from hypergen.models import loading
from hypergen.models.family import Family
from tests.support.checkpoint_layouts import with_fields
from tests.support.diffusers_edits import assert_same, left_half_mask, pixels_of, sample_image, to_pillow
from tests.support.model_folders import error_message
from tests.support.small_models import save_flux
from tests.support.sync_engine import InlineEngine, generate_alone, make_request, make_settings

_STEPS = {"num_inference_steps": 4, "guidance_scale": 20.0, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flux(tmp_path_factory.mktemp("models") / "flux-fill", "fill")


@pytest.fixture(scope="module")
def family(folder: Path) -> Family:
    return loading.load(folder, make_settings())


def test_edits_equal_diffusers(folder: Path, family: Family) -> None:
    stock: Any = FluxFillPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    image, mask = sample_image(), left_half_mask()
    requests = [make_request(**_STEPS, image=image, mask=mask, strength=strength) for strength in (1.0, 0.6)]
    batched = InlineEngine(family)
    batched.run(*requests)
    for request in requests:
        expected = np.asarray(
            stock(
                request.prompt,
                image=to_pillow(image),
                mask_image=to_pillow(mask),
                strength=request.strength,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                width=64,
                height=64,
                generator=torch.Generator().manual_seed(request.seed),
            ).images[0]
        )
        assert_same(generate_alone(family, request)[:, :32], expected[:, :32])
        assert_same(pixels_of(batched.data(request))[:, :32], expected[:, :32])


def test_it_takes_images_and_masks_and_has_its_own_defaults(family: Family) -> None:
    info = family.model_info("fill")
    assert {"image", "mask"} <= info.capabilities
    assert info.defaults.guidance_scale == 30
    assert generate_alone(family, make_request(**_STEPS)).std() > 0


def test_one_file_is_recognized_by_its_channels(tmp_path: Path) -> None:
    name = "transformer.single_transformer_blocks.0.attn.to_q.weight"
    file = tmp_path / "fill.safetensors"
    shapes = {name.removeprefix("transformer."): (8, 8), "x_embedder.weight": (8, 384)}
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, file)
    assert "black-forest-labs/FLUX.1-Fill-dev" in error_message(store.get_or_import, str(file))


def test_other_channels_are_refused(folder: Path, tmp_path: Path) -> None:
    path = with_fields(save_flux, "transformer/config.json")(tmp_path / "model")
    config = json.loads((path / "transformer/config.json").read_text())
    assert config["in_channels"] == 16
    pipeline: Any = FluxFillPipeline.from_pretrained(folder)
    transformer = type(pipeline.transformer).from_config({**config, "in_channels": 32})
    transformer.save_pretrained(path / "transformer")
    message = error_message(loading.load, path, make_settings())
    assert "32 input channels ('x_embedder.weight')" in message
