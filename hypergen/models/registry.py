"""Model families by the pipeline class that `model_index.json` names."""

from __future__ import annotations

from typing import Any

from hypergen.models.sd import StableDiffusion

FAMILIES: dict[str, type[Any]] = {
    "StableDiffusionPipeline": StableDiffusion,
}
