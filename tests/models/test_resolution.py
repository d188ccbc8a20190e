"""Generation sizes for requested sizes."""

from __future__ import annotations

import itertools

import pytest

from hypergen.models.resolution import choose_generation_size, nearest_native_size, round_up


def test_rounding_up_gives_the_next_multiple() -> None:
    assert [round_up(side, 8) for side in (64, 65, 71, 72)] == [64, 72, 72, 72]


_SIDES = (64, 72, 200, 256, 512, 768, 1024, 1664, 2048, 2432)


@pytest.mark.parametrize(("width", "height"), [*itertools.product(_SIDES, _SIDES)])
def test_the_nearest_native_size_keeps_area_and_aspect_ratio(width: int, height: int) -> None:
    native_area = 256 * 256
    if width * height <= native_area:
        return
    native_width, native_height = nearest_native_size(width, height, native_area, 8)
    assert native_width % 8 == native_height % 8 == 0
    assert min(native_width, native_height) >= 64
    assert 0.85 <= native_width * native_height / native_area <= 1.1
    if min(native_width, native_height) > 64:
        assert native_width / native_height == pytest.approx(width / height, rel=0.15)
    assert nearest_native_size(height, width, native_area, 8) == (native_height, native_width)


def test_a_multiple_of_the_native_size_gives_the_native_size() -> None:
    assert nearest_native_size(1024, 1024, 256 * 256, 8) == (256, 256)
    assert nearest_native_size(1024, 512, 256 * 128, 8) == (256, 128)


@pytest.mark.parametrize(
    ("requested", "generated"),
    [
        ((64, 64), (128, 128)),
        ((70, 85), (144, 176)),
        ((64, 128), (128, 256)),
        ((64, 256), (128, 512)),
        ((64, 264), (64, 264)),
        ((96, 96), (96, 96)),
        ((250, 100), (256, 104)),
        ((1024, 1024), (256, 256)),
    ],
)
def test_small_and_large_sizes_are_generated_at_native_sizes(
    requested: tuple[int, int], generated: tuple[int, int]
) -> None:
    assert choose_generation_size(*requested, 8, 256 * 256, 96) == generated


def test_a_model_without_native_sizes_generates_every_size() -> None:
    assert choose_generation_size(64, 1024, 8, None, None) == (64, 1024)
