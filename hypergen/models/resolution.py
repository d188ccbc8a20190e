"""Sizes: from what was asked to what a model can draw."""

from __future__ import annotations

_SMALLEST_SIDE = 64  # pixels, as in the API


def round_up(side: int, multiple: int) -> int:
    """The smallest multiple that is not below `side`."""
    return -(-side // multiple) * multiple


def choose_generation_size(
    width: int, height: int, multiple: int, max_native_area: int | None, min_native_side: int | None
) -> tuple[int, int]:
    """The size at which a model draws what was asked for, of sides that are multiples.

    Above `max_native_area` pixels it is the nearest native size; where a side is below `min_native_side`,
    twice the asked size if that is within the native area.
    """
    if max_native_area is not None and width * height > max_native_area:
        return nearest_native_size(width, height, max_native_area, multiple)
    width, height = round_up(width, multiple), round_up(height, multiple)
    is_small = min_native_side is not None and min(width, height) < min_native_side
    if is_small and (max_native_area is None or 4 * width * height <= max_native_area):
        return 2 * width, 2 * height
    return width, height


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
