"""Model families by the pipeline class in `model_index.json`.

Families are not imported here: the HTTP half checks models before it downloads them, without torch.
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
    """Import the family of a pipeline class."""
    module, _, name = FAMILIES[pipeline_class].partition(":")
    return getattr(importlib.import_module(module), name)


@functools.cache
def servable() -> frozenset[str]:
    """Pipeline classes of the families, and all others of the installed diffusers.

    `DiffusersPipeline` checks at loading whether one of the others is text-to-image. The names are read from
    diffusers' file, because importing diffusers imports torch.
    """
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None
    assert spec.origin is not None
    names = re.findall(r'"(\w+Pipeline)"', Path(spec.origin).read_text(encoding="utf-8"))
    return frozenset(FAMILIES) | frozenset(names)
