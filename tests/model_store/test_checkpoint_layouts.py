"""Each layout of `LAYOUTS` gives the image that diffusers makes of the same model as a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from hypergen.model_store import store
from hypergen.models import loading
from hypergen.models.family import Family
from hypergen.served_model_config import ModelOptions
from tests.support.checkpoint_layouts import LAYOUTS, REFUSED, Layout
from tests.support.compare_with_diffusers import assert_same, common_arguments
from tests.support.model_folders import error_message
from tests.support.sync_engine import generate_alone, make_request, make_settings

_REQUEST = make_request(num_inference_steps=3, guidance_scale=4.0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read_as_the_model_that_it_holds(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    file, configuration, model = layout.build(tmp_path)
    options = ModelOptions.model_validate(layout.options)
    stored = store.get_or_import(str(file), single_file_config=str(configuration), options=options)
    shutil.rmtree(configuration)
    family = loading.load_any(stored.path, make_settings(), None, options)
    assert isinstance(family, Family)
    assert_same(generate_alone(family, _REQUEST), _stock_image(model))


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_served_is_refused_by_name_before_anything_is_fetched(
    name: str, tmp_path: Path
) -> None:
    refused = REFUSED[name]
    message = error_message(store.get_or_import, str(refused.build(tmp_path / "refused.safetensors")))
    for reason in ("refused.safetensors", *refused.reasons):
        assert reason in message
    assert "HF_HUB_OFFLINE" not in message
    assert not store.list_models()


def _stock_image(folder: Path) -> np.ndarray:
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return np.asarray(pipeline(_REQUEST.prompt, **common_arguments(_REQUEST)).images[0])


def test_the_layouts_differ(tmp_path: Path) -> None:
    """Else the test above could not fail: the same weights mean other images."""
    images = [_image(LAYOUTS[name], tmp_path / str(i)) for i, name in enumerate(_OF_THE_SAME_WEIGHTS)]
    assert np.abs(images[0].astype(int) - images[1]).mean() > 5


_OF_THE_SAME_WEIGHTS = ("SDXL", "SDXL v-prediction, by markers")


def _image(layout: Layout, folder: Path) -> np.ndarray:
    folder.mkdir()
    with torch.inference_mode():
        return _stock_image(layout.build(folder)[2])
