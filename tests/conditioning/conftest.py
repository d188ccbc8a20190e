"""The small model and diffusers' pipelines over the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline

from hypergen.models import loading
from tests.support.sync_engine import make_settings


@pytest.fixture(scope="session")
def parts(sd_folder: Path) -> dict[str, Any]:
    """Of diffusers' pipelines: modules of their own, since an engine changes its layers."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    return {**pipeline.components, "requires_safety_checker": False}


@pytest.fixture(scope="session")
def family(sd_folder: Path) -> Any:
    return loading.load(sd_folder, make_settings())
