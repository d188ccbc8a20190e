"""Model families by the pipeline class that `model_index.json` names.

Families are named and not imported here, so that the HTTP half can check a model without torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

FAMILIES: dict[str, str] = {
    "FluxPipeline": "hypergen.models.flux:Flux",
    "StableDiffusion3Pipeline": "hypergen.models.sd3:StableDiffusion3",
    "StableDiffusionPipeline": "hypergen.models.sd:StableDiffusion",
    "StableDiffusionInpaintPipeline": "hypergen.models.sd:StableDiffusion",
    "StableDiffusionXLPipeline": "hypergen.models.sdxl:StableDiffusionXL",
}


def family_class(pipeline_class: str) -> Any:
    """Import the family of this pipeline class."""
    module, _, name = FAMILIES[pipeline_class].partition(":")
    return getattr(importlib.import_module(module), name)


@functools.cache
def servable() -> frozenset[str]:
    """The pipeline classes of the families, and all others in the installed diffusers.

    Whether one of the others generates from a prompt alone is checked at loading, see `DiffusersPipeline`.
    The names are parsed from diffusers' source, because importing it imports torch.
    """
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None
    assert spec.origin is not None
    names = re.findall(r'"(\w+Pipeline)"', Path(spec.origin).read_text(encoding="utf-8"))
    return frozenset(FAMILIES) | frozenset(names)
