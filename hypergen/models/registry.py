"""Model families by the pipeline class that `model_index.json` names.

Families are named and not imported here: the torch-free half knows what is served before it downloads.
"""

from __future__ import annotations

import importlib
from typing import Any

FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "hypergen.models.sd:StableDiffusion",
    "StableDiffusionInpaintPipeline": "hypergen.models.sd:StableDiffusion",
}


def family_class(pipeline_class: str) -> Any:
    """Import the family that draws this pipeline class."""
    module, _, name = FAMILIES[pipeline_class].partition(":")
    return getattr(importlib.import_module(module), name)
