"""Generation sizes: from a requested size to one that a model supports."""

from __future__ import annotations

_SMALLEST_SIDE = 64  # pixels, as in the API


def round_up(side: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-side // multiple) * multiple


def choose_generation_size(
    width: int, height: int, multiple: int, max_native_area: int | None, min_native_side: int | None
) -> tuple[int, int]:
    """The generation size for a requested size; sides are multiples of `multiple`.

    Above `max_native_area` pixels it is the nearest native size. If a side is below `min_native_side`, it is
    twice the requested size if that is within the native area.
    """
    if max_native_area is not None and width * height > max_native_area:
        return nearest_native_size(width, height, max_native_area, multiple)
    width, height = round_up(width, multiple), round_up(height, multiple)
    is_small = min_native_side is not None and min(width, height) < min_native_side
    if is_small and (max_native_area is None or 4 * width * height <= max_native_area):
        return 2 * width, 2 * height
    return width, height


def nearest_native_size(width: int, height: int, native_area: int, multiple: int) -> tuple[int, int]:
    """The size of about `native_area` pixels with the aspect ratio nearest to the requested one.

    Sides are multiples of `multiple`. A side is at least 64 pixels; the other is then limited by the area.
    """
    scale = (native_area / (width * height)) ** 0.5

    def round_side(side: float) -> int:
        return max(_SMALLEST_SIDE, round(side / multiple) * multiple)

    native_width, native_height = round_side(width * scale), round_side(height * scale)
    if native_width == _SMALLEST_SIDE:
        native_height = min(native_height, round_side(native_area / _SMALLEST_SIDE))
    if native_height == _SMALLEST_SIDE:
        native_width = min(native_width, round_side(native_area / _SMALLEST_SIDE))
    return native_width, native_height
