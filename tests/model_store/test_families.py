"""The store accepts the layouts of all families as complete models, and stores all of their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from hypergen.model_families import PIPELINES
from hypergen.model_store.diffusers_layout import (
    PIPELINE_FILE,
    check_folder,
    require_pipeline,
    select_in_folder,
)
from tests.support.checkpoint_layouts import with_fields
from tests.support.model_folders import files_of
from tests.support.small_models import save_flux, save_sd, save_sd3, save_sdxl


def _inpainting(save: Callable[[Path], Path], pipeline_class: str) -> Callable[[Path], Path]:
    """The layout is that of the text-to-image model; the name and the UNet's channels differ."""
    return with_fields(save, PIPELINE_FILE, _class_name=pipeline_class)


_SAVE: dict[str, Callable[[Path], Path]] = {
    "FluxFillPipeline": partial(save_flux, variant="fill"),
    "FluxPipeline": save_flux,
    "StableDiffusion3Pipeline": partial(save_sd3, t5=False),
    "StableDiffusionInpaintPipeline": _inpainting(save_sd, "StableDiffusionInpaintPipeline"),
    "StableDiffusionPipeline": save_sd,
    "StableDiffusionXLInpaintPipeline": _inpainting(save_sdxl, "StableDiffusionXLInpaintPipeline"),
    "StableDiffusionXLPipeline": save_sdxl,
}


@pytest.mark.parametrize("pipeline_class", PIPELINES)
def test_every_file_of_a_family_is_stored(tmp_path: Path, pipeline_class: str) -> None:
    folder = _SAVE[pipeline_class](tmp_path / "model")
    assert json.loads((folder / PIPELINE_FILE).read_text())["_class_name"] == pipeline_class
    check_folder(folder)
    require_pipeline("model", PIPELINES, folder / PIPELINE_FILE)
    assert select_in_folder(folder, prefer_fp16=False).files.keys() == files_of(folder)
