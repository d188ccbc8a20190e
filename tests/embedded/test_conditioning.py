"""Image to image and inpainting with the embedded model, checked by colours."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hypergen.images import encoding
from hypergen.models import loading
from hypergen.request import GenerationRequest, InputImage
from tests.support.diffusers_edits import left_half_mask, pixels_of
from tests.support.sync_engine import InlineEngine, generate_alone, make_request, make_settings

EMBEDDED = Path(__file__).parents[2] / "hypergen" / "embedded"
RED, BLUE = (220, 38, 38), (40, 70, 220)


@pytest.fixture(scope="module")
def family() -> Any:
    return loading.load(EMBEDDED, make_settings())


def _red_circle(width: int, height: int, box: tuple[int, int, int, int]) -> InputImage:
    canvas = Image.new("RGB", (width, height), (245, 245, 245))
    ImageDraw.Draw(canvas).ellipse(box, fill=RED)
    return InputImage(width, height, canvas.tobytes())


def _request(image: InputImage, **changes: Any) -> GenerationRequest:
    values: dict[str, Any] = {
        "width": image.width,
        "height": image.height,
        "num_inference_steps": 10,
        "guidance_scale": 4.0,
        "image": image,
        **changes,
    }
    return make_request(**values)


def _near(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.abs(pixels.astype(int) - colour).max(axis=2) < 60


def _array(image: InputImage) -> np.ndarray:
    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)


def test_a_red_circle_becomes_blue_in_its_position(family: Any) -> None:
    image = _red_circle(96, 96, (9, 30, 48, 69))
    request = _request(image, prompt="a blue circle on a white background", strength=0.5)
    pixels, circle = generate_alone(family, request), _near(_array(image), RED)
    assert not _near(pixels, RED).any()
    assert (_near(pixels, BLUE) & circle).sum() > 0.85 * circle.sum()
    assert (_near(pixels, BLUE) & ~circle).sum() < 0.4 * circle.sum()


def test_more_strength_changes_more(family: Any) -> None:
    image = _red_circle(64, 64, (6, 20, 32, 46))
    strengths = (0.0, 0.1, 0.2, 0.3, 0.5)
    prompt = "a green star on a black background"
    requests = [_request(image, prompt=prompt, strength=strength) for strength in strengths]
    engine = InlineEngine(family)
    engine.run(*requests)
    results = [pixels_of(engine.data(request)) for request in requests]
    changes = [np.abs(pixels.astype(int) - _array(image)).mean() for pixels in results]
    assert changes[0] == 0
    assert all(more > 1.05 * less for less, more in pairwise(changes)), changes


def test_only_the_masked_half_changes(family: Any) -> None:
    image = _red_circle(128, 128, (30, 30, 98, 98))
    prompt = "a yellow square on a green background"
    request = _request(image, prompt=prompt, mask=left_half_mask(128, 128))
    pixels = pixels_of(encoding.encode_image(generate_alone(family, request), request, 0, "m"))
    assert (pixels[:, 64:] == _array(image)[:, 64:]).all()
    assert not _near(pixels[:, :56], RED).any()
    assert _near(pixels[:, :56], (34, 160, 60)).mean() > 0.4


def test_kept_pixels_are_unchanged_with_another_generation_size(family: Any) -> None:
    """Above its native area the model generates a smaller image, which is resized."""
    image = _red_circle(384, 256, (100, 60, 240, 200))
    prompt = "a yellow square on a green background"
    request = _request(image, prompt=prompt, mask=left_half_mask(384, 256), num_inference_steps=4)
    assert family.generation_size(384, 256) != (384, 256)
    pixels = pixels_of(encoding.encode_image(generate_alone(family, request), request, 0, "m"))
    assert (pixels[:, 192:] == _array(image)[:, 192:]).all()
    assert np.abs(pixels[:, :192].astype(int) - _array(image)[:, :192]).mean() > 30
