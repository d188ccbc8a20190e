"""The arguments of diffusers' pipelines, read from its source, because importing diffusers imports torch."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from pathlib import Path

# Inputs without which a pipeline fails, even where its signature has a default.
_INPUTS = (
    "image",
    "images",
    "control_image",
    "mask_image",
    "cond_image",
    "video",
    "control_video",
    "conditioning_frames",
    "audio",
)
# Pipelines that also generate without one.
_OPTIONAL = (
    "Flux2KleinKVPipeline",
    "Flux2KleinPipeline",
    "Flux2Pipeline",
    "FluxKontextPipeline",
    "GlmImagePipeline",
    "QwenImage21Pipeline",
    "StableCascadeCombinedPipeline",
    "UniDiffuserPipeline",
    "ZImageOmniPipeline",
)


@functools.cache
def image_argument(pipeline_class: str) -> str | None:
    """The input image, video or sound that a pipeline class needs; None: it generates from a prompt."""
    if pipeline_class in _OPTIONAL:
        return None
    arguments = call_arguments(pipeline_class)
    return next((name for name in _INPUTS if name in arguments), None)


def call_arguments(pipeline_class: str) -> list[str]:
    """The arguments by which a pipeline class generates; empty: it has those of another class."""
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None
    assert spec.origin is not None
    definition = re.compile(rf"^class {pipeline_class}\(", re.MULTILINE)
    for file in sorted((Path(spec.origin).parent / "pipelines").rglob("pipeline_*.py")):
        source = file.read_text(encoding="utf-8")
        if not definition.search(source):
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and node.name == pipeline_class:
                calls = (part for part in node.body if isinstance(part, ast.FunctionDef))
                return [
                    argument.arg
                    for call in calls
                    if call.name == "__call__"
                    for argument in (*call.args.args, *call.args.kwonlyargs)
                ]
    return []
