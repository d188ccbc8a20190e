"""Sizes: from what was asked to what a model can draw."""

from __future__ import annotations

_SMALLEST_SIDE = 64  # pixels, as in the API


def round_up(side: int, multiple: int) -> int:
    """The smallest multiple that is not below `side`."""
    return -(-side // multiple) * multiple


def nearest_native_size(width: int, height: int, native_area: int, multiple: int) -> tuple[int, int]:
    """The size of about `native_area` pixels whose sides are multiples and whose shape is nearest to the
    asked one.

    A side never falls below 64 pixels; the other one then takes what the area leaves.
    """
    scale = (native_area / (width * height)) ** 0.5

    def fit(side: float) -> int:
        return max(_SMALLEST_SIDE, round(side / multiple) * multiple)

    drawn_width, drawn_height = fit(width * scale), fit(height * scale)
    if drawn_width == _SMALLEST_SIDE:
        drawn_height = min(drawn_height, fit(native_area / _SMALLEST_SIDE))
    if drawn_height == _SMALLEST_SIDE:
        drawn_width = min(drawn_width, fit(native_area / _SMALLEST_SIDE))
    return drawn_width, drawn_height
