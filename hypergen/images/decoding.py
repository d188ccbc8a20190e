"""Input images: from base64 or a file's bytes to upright pixels at the requested size.

Only a file's bytes determine its format, never its name or media type. URLs are not fetched. Decoding the
largest allowed image takes a second, so callers run it in a thread.
"""

from __future__ import annotations

import base64
import re
import threading
from contextvars import ContextVar
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageChops

from hypergen.errors import InvalidRequestError
from hypergen.images.geometry import resize_input_image
from hypergen.images.image_files import TooManyPartsError, pixels_and_orientation
from hypergen.request import InputImage

INPUT_FORMATS = ("PNG", "JPEG", "WEBP")
# Checked in the header, before decoding: a decompression bomb of a few kB would fill the memory.
MAX_PIXELS = 40_000_000
MAX_SIDE = 8192

# The part of a `data:` URL before its base64; a longer one cannot be a media type.
_MAX_PREFIX = 1024
_URL_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,30}:", re.ASCII | re.IGNORECASE)

# EXIF orientation -> the transposition that makes the image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The caller sets the event when the client has disconnected, so that decoding stops.
decoding_cancelled: ContextVar[threading.Event | None] = ContextVar("decoding_cancelled", default=None)


class DecodingCancelledError(Exception):
    """The client has disconnected, so the image is not needed."""


def raise_if_cancelled() -> None:
    """Called between the stages of decoding, and while a file is read."""
    cancelled = decoding_cancelled.get()
    if cancelled is not None and cancelled.is_set():
        raise DecodingCancelledError


class _CancellableFile(BytesIO):
    """Raises on the next read after decoding is cancelled; Pillow reads JPEG and PNG in blocks of 64 kB."""

    def read(self, size: int | None = -1, /) -> bytes:
        raise_if_cancelled()
        return super().read(size)


def from_base64(text: str, param: str) -> bytes:
    """The bytes of a file from bare base64 or a `data:` URL; whitespace is ignored.

    Raises:
        InvalidRequestError: the text is neither, for example another URL; URLs are not fetched.
    """
    prefix, comma, _ = text[:_MAX_PREFIX].partition(",")
    is_data_url = comma and prefix[:5].lower() == "data:" and prefix[-7:].lower() == ";base64"
    if not is_data_url and _URL_SCHEME.match(text):
        raise InvalidRequestError(
            f"'{param}' must be base64 or a data: URL with base64; other URLs are not fetched.", param=param
        )
    encoded = text[len(prefix) + 1 :] if is_data_url else text
    try:
        # Not `split`: text that is mostly line breaks would become millions of objects.
        return base64.b64decode(encoded.encode("ascii").translate(None, b" \t\n\v\f\r"), validate=True)
    except ValueError:  # also raised for text beyond ASCII
        raise InvalidRequestError(f"'{param}' is not valid base64.", param=param) from None


def check_header(data: bytes, param: str) -> Image.Image:
    """Open a file and check its header, without decoding pixels.

    Raises:
        InvalidRequestError: the file is not PNG, JPEG or WebP, is too large, or has too many parts.
        DecodingCancelledError: the client has disconnected.
    """
    return _open(data, param)[0]


def _open(data: bytes, param: str) -> tuple[Image.Image, int]:
    """The image, not decoded yet, and its EXIF orientation."""
    raise_if_cancelled()
    try:
        pixels, orientation = pixels_and_orientation(data)
        image = Image.open(_CancellableFile(pixels), formats=INPUT_FORMATS)
    except DecodingCancelledError:
        raise
    except TooManyPartsError as error:
        raise InvalidRequestError(
            f"'{param}' has more than {error}; save the image again.", param=param
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(param, "too large to decode safely") from None
    except Exception:  # Pillow raises many types for broken files
        raise _unreadable(param) from None
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise _too_large(param, f"{image.width}x{image.height}")
    return image, orientation


def decode(data: bytes, param: str) -> Image.Image:
    """Decode a file into RGB, or RGBA if it has transparency, and turn it upright by its EXIF orientation.

    The first frame of an animation is used. Colour profiles are ignored.

    Raises:
        InvalidRequestError: the file is unreadable, incomplete or too large.
        DecodingCancelledError: the client has disconnected.
    """
    image, orientation = _open(data, param)
    try:
        _scale_transparent_value(image)
        image.load()
        raise_if_cancelled()
        if image.mode.startswith(("I", "F")):
            image = _to_8_bits(image)
        mode = "RGBA" if image.has_transparency_data else "RGB"
        if image.mode != mode:
            image = image.convert(mode)
        return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
    except DecodingCancelledError:
        raise
    except Exception:  # Pillow raises many types for broken files
        raise _unreadable(param) from None


def _scale_transparent_value(image: Image.Image) -> None:
    """Scale the transparent value of a PNG like its pixels.

    Pillow scales the pixels of 2, 4 and 16 bits to 8, but compares them with the value in the file.
    """
    value = image.info.get("transparency")
    tiles: list[Any] = getattr(image, "tile", [])
    raw_mode = tiles[0][3] if tiles else None
    if isinstance(value, int) and raw_mode in ("L;2", "L;4"):
        image.info["transparency"] = value * 255 // (3 if raw_mode == "L;2" else 15)
    elif isinstance(value, tuple) and raw_mode == "RGB;16B":
        image.info["transparency"] = tuple(channel >> 8 for channel in value)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit greyscale as L, or as LA if one of its values is transparent; `convert("L")` would clip it."""
    grey = image.convert("I").point(lambda value: value / 257).convert("L")
    value = grey.info.pop("transparency", None)
    if value is None:
        return grey
    alpha = Image.fromarray(np.where(np.asarray(image) == value, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))


def to_input_image(image: Image.Image, width: int, height: int) -> InputImage:
    """A decoded image, cropped and resized to the requested size; transparent pixels become white."""
    raise_if_cancelled()
    if image.mode == "RGBA":
        opaque = Image.new("RGB", image.size, "white")
        opaque.paste(image, mask=image.getchannel("A"))
        image = opaque
    return InputImage(width, height, resize_input_image(image, (width, height)).tobytes())


def to_mask(image: Image.Image, width: int, height: int) -> InputImage:
    """A decoded mask at the requested size: one byte per pixel, 255 = generate, 0 = keep.

    In a mask with transparency, transparent pixels are generated and opaque ones kept. Otherwise white pixels
    are generated and black ones kept. Values in between blend the two.
    """
    raise_if_cancelled()
    mask = ImageChops.invert(image.getchannel("A")) if image.mode == "RGBA" else image.convert("L")
    return InputImage(width, height, resize_input_image(mask, (width, height)).tobytes())


def _too_large(param: str, size: str) -> InvalidRequestError:
    limit = f"{MAX_PIXELS // 1_000_000} megapixels and {MAX_SIDE} pixels per side"
    return InvalidRequestError(f"'{param}' is {size}; the limit is {limit}.", param=param)


def _unreadable(param: str) -> InvalidRequestError:
    return InvalidRequestError(f"'{param}' is not a readable PNG, JPEG or WebP image.", param=param)
