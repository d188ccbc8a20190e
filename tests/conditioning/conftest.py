"""The small model, and the components of diffusers' pipelines with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline

from hypergen.models import loading
from tests.support.sync_engine import make_settings


@pytest.fixture(scope="session")
def parts(sd_folder: Path) -> dict[str, Any]:
    """Components for diffusers' pipelines; not those of `family`, because an engine replaces layers."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    return {**pipeline.components, "requires_safety_checker": False}


@pytest.fixture(scope="session")
def family(sd_folder: Path) -> Any:
    return loading.load(sd_folder, make_settings())
