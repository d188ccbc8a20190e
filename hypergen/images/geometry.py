"""Geometry: from an input image's size to the requested size to the generation size, and back.

Sizes are (width, height) and boxes (left, top, right, bottom), in pixels, as in Pillow.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from hypergen.request import InputImage

Size = tuple[int, int]
Box = tuple[int, int, int, int]

# Requested widths and heights are multiples of it.
SIZE_MULTIPLE = 8


def request_size_of(size: Size, min_side: int, max_side: int) -> Size:
    """An input image's size, scaled into the limits and rounded down to `SIZE_MULTIPLE`."""
    largest = max_side // SIZE_MULTIPLE * SIZE_MULTIPLE
    scale = min(1.0, max_side / max(size))
    scale = max(scale, min_side / min(size))
    width, height = (
        min(largest, max(min_side, int(side * scale) // SIZE_MULTIPLE * SIZE_MULTIPLE)) for side in size
    )
    return width, height


def resize_input_image(image: Image.Image, size: Size) -> Image.Image:
    """Crop an input image around its centre to the requested aspect ratio, and resize it.

    If the size only differs by the rounding of `request_size_of`, it is cropped without resampling.
    """
    if all(0 <= own - side < SIZE_MULTIPLE for own, side in zip(image.size, size, strict=True)):
        return image.crop(_centred(size, image.size))
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = (
        min(own, max(1, round(side / scale))) for own, side in zip(image.size, size, strict=True)
    )
    box = _centred((width, height), image.size)
    if (width, height) == size:
        return image.crop(box)
    return image.resize(size, Image.Resampling.LANCZOS, box=box)


def resize_to_generation_size(image: InputImage, size: Size) -> np.ndarray:
    """The inverse of `resize_to_request_size`: it pads where that crops, at the same offsets.

    If the generation size is less than twice as large, the edges are repeated outwards. Otherwise the image
    is resized.

    Returns:
        uint8, shape (height, width, 3), or (height, width) of a mask.
    """
    pixels = np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, -1)
    box = _request_box((image.width, image.height), size)
    if box is not None:
        left, top, right, bottom = box
        margins = ((top, size[1] - bottom), (left, size[0] - right), (0, 0))
        pixels = np.pad(pixels, margins, mode="edge")
        return pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    source = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return np.asarray(source.resize(size, Image.Resampling.LANCZOS))


def resize_to_request_size(image: Image.Image, size: Size) -> Image.Image:
    """A generated image at the requested size.

    It is cropped if the requested size is a little smaller, because sizes are rounded up to the model's
    multiple. Otherwise it is resized.
    """
    if image.size == size:
        return image
    box = _request_box(size, image.size)
    return image.resize(size, Image.Resampling.LANCZOS) if box is None else image.crop(box)


def _request_box(request_size: Size, generation_size: Size) -> Box | None:
    """The box of the requested image in a generated one; None if it must be resized instead."""
    sides = zip(request_size, generation_size, strict=True)
    if all(requested <= generated < 2 * requested for requested, generated in sides):
        return _centred(request_size, generation_size)
    return None


def _centred(inner: Size, outer: Size) -> Box:
    left, top = (outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2
    return left, top, left + inner[0], top + inner[1]
