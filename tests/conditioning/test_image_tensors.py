"""Pictures at the drawn size: padded where it is a little larger, resized where it is another."""

from __future__ import annotations

import numpy as np
from PIL import Image

from hypergen.conditioning.image_tensors import fit, to_image, to_mask
from hypergen.images import encoding
from tests.support.diffusers_edits import left_half, picture, to_pillow


def test_a_padded_picture_is_cut_out_again_where_it_was() -> None:
    sent = picture(100, 68)
    fitted = fit(sent, 104, 72)
    assert fitted.shape == (72, 104, 3)
    assert (np.asarray(encoding.fit(Image.fromarray(fitted), 100, 68)) == np.asarray(to_pillow(sent))).all()
    assert (fitted[:, 0] == fitted[:, 2]).all()


def test_a_picture_of_another_size_is_resized() -> None:
    fitted = fit(picture(128, 128), 64, 32)
    assert fitted.shape == (32, 64, 3)
    assert abs(fitted.mean() - np.asarray(to_pillow(picture(128, 128))).mean()) < 2


def test_a_picture_that_is_drawn_twice_as_large_is_enlarged() -> None:
    sent = left_half(64, 64)
    fitted = fit(sent, 128, 128)
    assert fitted.shape == (128, 128)
    assert (fitted[:, :60] > 250).all()
    assert (fitted[:, 68:] < 5).all()


def test_a_mask_is_split_at_half() -> None:
    assert to_mask(fit(left_half(64, 64), 64, 64)).mean() == 0.5
    assert to_mask(fit(left_half(64, 64, drawn=127), 64, 64)).max() == 0
    assert to_mask(fit(left_half(128, 128), 32, 32)).mean() == 0.5


def test_pixels_reach_from_minus_one_to_one() -> None:
    pixels = np.array([[[0, 255, 51]]], np.uint8)
    assert to_image(pixels).flatten().tolist() == [-1, 1, np.float32(2 * np.float32(0.2) - 1)]
