"""Input images as tensors."""

from __future__ import annotations

import numpy as np

from hypergen.conditioning.image_tensors import to_image, to_mask
from hypergen.images.geometry import resize_to_generation_size
from tests.support.diffusers_edits import left_half_mask


def test_mask_pixels_from_128_on_are_generated() -> None:
    assert to_mask(resize_to_generation_size(left_half_mask(64, 64), (64, 64))).mean() == 0.5
    assert to_mask(resize_to_generation_size(left_half_mask(64, 64, value=127), (64, 64))).max() == 0
    assert to_mask(resize_to_generation_size(left_half_mask(128, 128), (32, 32))).mean() == 0.5


def test_pixels_are_scaled_to_minus_one_to_one() -> None:
    pixels = np.array([[[0, 255, 51]]], np.uint8)
    assert to_image(pixels).flatten().tolist() == [-1, 1, np.float32(2 * np.float32(0.2) - 1)]
