"""Sizes: padding and cropping if the generation size is a little larger, else resizing."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hypergen.images.geometry import request_size_of, resize_to_generation_size, resize_to_request_size
from tests.images.test_encoding import noise
from tests.support.diffusers_edits import left_half_mask, sample_image, to_pillow


def test_cropping_reverts_padding() -> None:
    image = sample_image(100, 68)
    padded = resize_to_generation_size(image, (104, 72))
    assert padded.shape == (72, 104, 3)
    cropped = resize_to_request_size(Image.fromarray(padded), (100, 68))
    assert (np.asarray(cropped) == np.asarray(to_pillow(image))).all()
    assert (padded[:, 0] == padded[:, 2]).all()


def test_an_input_image_of_another_size_is_resized() -> None:
    resized = resize_to_generation_size(sample_image(128, 128), (64, 32))
    assert resized.shape == (32, 64, 3)
    assert abs(resized.mean() - np.asarray(to_pillow(sample_image(128, 128))).mean()) < 2


def test_a_mask_is_enlarged_if_the_generation_size_is_twice_as_large() -> None:
    resized = resize_to_generation_size(left_half_mask(64, 64), (128, 128))
    assert resized.shape == (128, 128)
    assert (resized[:, :60] > 250).all()
    assert (resized[:, 68:] < 5).all()


def test_an_image_generated_a_little_larger_is_cropped_in_the_middle() -> None:
    pixels = noise(80, 72)
    resized = resize_to_request_size(Image.fromarray(pixels), (64, 64))
    assert np.array_equal(np.asarray(resized), pixels[4:68, 8:72])


def test_an_image_generated_smaller_is_resized() -> None:
    white = np.full((64, 32, 3), 255, np.uint8)
    resized = resize_to_request_size(Image.fromarray(white), (128, 256))
    assert resized.size == (128, 256)
    assert np.asarray(resized).min() == 255


def test_an_image_generated_twice_as_large_is_resized() -> None:
    halves = np.repeat([[0], [255]], 64, axis=0).astype(np.uint8)[..., None].repeat(128, 1).repeat(3, 2)
    resized = np.asarray(resize_to_request_size(Image.fromarray(halves), (64, 64)))
    assert resized.shape == (64, 64, 3)
    assert (resized[0] == 0).all()
    assert (resized[-1] == 255).all()


def test_an_image_of_the_requested_size_is_unchanged() -> None:
    image = Image.fromarray(noise())
    assert resize_to_request_size(image, (64, 64)) is image


@pytest.mark.parametrize(
    ("own", "expected"), [((300, 10), (96, 64)), ((101, 79), (96, 72)), ((2, 2), (64, 64))]
)
def test_the_request_size_of_an_input_image_is_rounded_and_within_the_limits(
    own: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert request_size_of(own, min_side=64, max_side=100) == expected
