"""Sizes: padded and cropped where the generation size is a little larger, resized where it is another."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hypergen.images.geometry import request_size_of, resize_to_generation_size, resize_to_request_size
from tests.images.test_encoding import noise
from tests.support.diffusers_edits import left_half, picture, to_pillow


def test_a_padded_picture_is_cut_out_again_where_it_was() -> None:
    sent = picture(100, 68)
    fitted = resize_to_generation_size(sent, (104, 72))
    assert fitted.shape == (72, 104, 3)
    cropped = resize_to_request_size(Image.fromarray(fitted), (100, 68))
    assert (np.asarray(cropped) == np.asarray(to_pillow(sent))).all()
    assert (fitted[:, 0] == fitted[:, 2]).all()


def test_a_picture_of_another_size_is_resized() -> None:
    fitted = resize_to_generation_size(picture(128, 128), (64, 32))
    assert fitted.shape == (32, 64, 3)
    assert abs(fitted.mean() - np.asarray(to_pillow(picture(128, 128))).mean()) < 2


def test_a_picture_that_is_drawn_twice_as_large_is_enlarged() -> None:
    sent = left_half(64, 64)
    fitted = resize_to_generation_size(sent, (128, 128))
    assert fitted.shape == (128, 128)
    assert (fitted[:, :60] > 250).all()
    assert (fitted[:, 68:] < 5).all()


def test_what_was_drawn_larger_is_cropped_in_the_middle() -> None:
    pixels = noise(80, 72)
    fitted = resize_to_request_size(Image.fromarray(pixels), (64, 64))
    assert np.array_equal(np.asarray(fitted), pixels[4:68, 8:72])


def test_what_was_drawn_smaller_is_resized() -> None:
    white = np.full((64, 32, 3), 255, np.uint8)
    fitted = resize_to_request_size(Image.fromarray(white), (128, 256))
    assert fitted.size == (128, 256)
    assert np.asarray(fitted).min() == 255


def test_what_was_drawn_twice_as_large_is_resized() -> None:
    halves = np.repeat([[0], [255]], 64, axis=0).astype(np.uint8)[..., None].repeat(128, 1).repeat(3, 2)
    fitted = np.asarray(resize_to_request_size(Image.fromarray(halves), (64, 64)))
    assert fitted.shape == (64, 64, 3)
    assert (fitted[0] == 0).all()
    assert (fitted[-1] == 255).all()


def test_what_has_the_right_size_is_left_alone() -> None:
    image = Image.fromarray(noise())
    assert resize_to_request_size(image, (64, 64)) is image


@pytest.mark.parametrize(
    ("own", "expected"), [((300, 10), (96, 64)), ((101, 79), (96, 72)), ((2, 2), (64, 64))]
)
def test_an_input_image_has_a_size_that_can_be_requested(
    own: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert request_size_of(own, min_side=64, max_side=100) == expected
