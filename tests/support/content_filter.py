"""Content filters for `--safety-checker tests.support.content_filter:NAME`."""

from __future__ import annotations

from PIL import Image

NOT_A_FUNCTION = 1


def refuse_marked(images: list[Image.Image], prompt: str) -> list[bool]:
    """Refuses by the prompt, and checks the images that it gets."""
    assert all(image.mode == "RGB" for image in images)
    if "broken" in prompt:
        raise RuntimeError("no verdict")
    return ["refused" in prompt for _ in images]


def say_nothing(_images: list[Image.Image], _prompt: str) -> list[bool]:
    return []


def say_scores(images: list[Image.Image], _prompt: str) -> list[float]:
    return [0.1] * len(images)
