"""Pictures that clients send: read from base64 or a file's bytes, decoded, upright, fitted to the asked size.

Only the bytes say what a file is, never its name or media type; nothing is fetched from an address. Decoding
takes a second for the largest, so it belongs into a thread.
"""

from __future__ import annotations

import base64
import re
import threading
from contextvars import ContextVar
from io import BytesIO

from PIL import Image, ImageChops

from hypergen.errors import InvalidRequestError
from hypergen.images.geometry import resize_input_image
from hypergen.images.image_files import TooManyPartsError, pixels_and_orientation
from hypergen.request import InputImage

FORMATS = ("PNG", "JPEG", "WEBP")
# By the header, before anything is decoded: a bomb of a few kB would else fill the memory.
MAX_PIXELS = 40_000_000
MAX_SIDE = 8192

# What stands before the base64 of a `data:` URL; longer ones are no media type.
_LONGEST_PREFIX = 1024
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]{0,30}:", re.ASCII | re.IGNORECASE)


# EXIF's orientation -> how to turn the image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Set by whoever decodes for a client: the event is set when nobody waits for the image any more.
decoding_cancelled: ContextVar[threading.Event | None] = ContextVar("decoding_cancelled", default=None)


class DecodingCancelledError(Exception):
    """Nobody waits for the image any more."""


def raise_if_cancelled() -> None:
    """Called between the steps of decoding, and while a file is read."""
    cancelled = decoding_cancelled.get()
    if cancelled is not None and cancelled.is_set():
        raise DecodingCancelledError


class _Source(BytesIO):
    """A file that stops when decoding is cancelled; Pillow reads JPEG and PNG in blocks of 64 kB."""

    def read(self, size: int | None = -1, /) -> bytes:
        raise_if_cancelled()
        return super().read(size)


def from_base64(text: str, param: str) -> bytes:
    """The bytes of a file given as bare base64 or as a `data:` URL; line breaks in it are fine.

    Raises:
        InvalidRequestError: it is neither; addresses are not fetched.
    """
    prefix, comma, _ = text[:_LONGEST_PREFIX].partition(",")
    is_data_url = comma and prefix[:5].lower() == "data:" and prefix[-7:].lower() == ";base64"
    if not is_data_url and _ADDRESS.match(text):
        raise InvalidRequestError(
            f"'{param}' must hold the image itself, as base64 or a data: URL with base64; "
            "addresses are not fetched.",
            param=param,
        )
    encoded = text[len(prefix) + 1 :] if is_data_url else text
    try:
        # Not `split`, which makes an object per word: millions of them in a text of line breaks.
        return base64.b64decode(encoded.encode("ascii").translate(None, b" \t\n\v\f\r"), validate=True)
    except ValueError:  # also text beyond ASCII
        raise InvalidRequestError(f"'{param}' is not valid base64.", param=param) from None


def look(data: bytes, param: str) -> Image.Image:
    """Open a file and check what its header says; nothing is decoded yet.

    Raises:
        InvalidRequestError: it is no PNG, JPEG or WebP, too large, or of too many parts.
        DecodingCancelledError: nobody waits for it any more.
    """
    return _open(data, param)[0]


def _open(data: bytes, param: str) -> tuple[Image.Image, int]:
    """The image, not decoded yet, and its orientation."""
    raise_if_cancelled()
    try:
        pixels, orientation = pixels_and_orientation(data)
        image = Image.open(_Source(pixels), formats=FORMATS)
    except DecodingCancelledError:
        raise
    except TooManyPartsError as error:
        raise InvalidRequestError(
            f"'{param}' has more than {error}; save the image anew.", param=param
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(param, "larger than is safe to look at") from None
    except Exception:  # Pillow's readers raise whatever a broken file makes them stumble over
        raise _unreadable(param) from None
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise _too_large(param, f"{image.width}x{image.height}")
    return image, orientation


def decode(data: bytes, param: str) -> Image.Image:
    """The image in a file, upright by its EXIF orientation, as RGB, or RGBA if it has transparency.

    Of an animation it is the first frame. Colour profiles are ignored.

    Raises:
        InvalidRequestError: the file is unreadable, truncated or too large.
        DecodingCancelledError: nobody waits for it any more.
    """
    image, orientation = _open(data, param)
    try:
        image.load()
        raise_if_cancelled()
        if image.mode.startswith(("I", "F")):  # 16 bits of grey, which a plain conversion would clip
            image = image.convert("I").point(lambda value: value / 257).convert("L")
        mode = "RGBA" if image.has_transparency_data else "RGB"
        if image.mode != mode:
            image = image.convert(mode)
        return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
    except DecodingCancelledError:
        raise
    except Exception:  # as above
        raise _unreadable(param) from None


def to_picture(image: Image.Image, width: int, height: int) -> InputImage:
    """A decoded picture at the asked size; what is transparent becomes white."""
    raise_if_cancelled()
    if image.mode == "RGBA":
        opaque = Image.new("RGB", image.size, "white")
        opaque.paste(image, mask=image.getchannel("A"))
        image = opaque
    return InputImage(width, height, resize_input_image(image, (width, height)).tobytes())


def to_mask(image: Image.Image, width: int, height: int) -> InputImage:
    """A decoded mask at the asked size: one byte a pixel, 255 where to draw, 0 where to keep.

    What is transparent is drawn and what is opaque is kept; in a mask without transparency, what is white is
    drawn and what is black is kept. What lies between is between.
    """
    raise_if_cancelled()
    draw = ImageChops.invert(image.getchannel("A")) if image.mode == "RGBA" else image.convert("L")
    return InputImage(width, height, resize_input_image(draw, (width, height)).tobytes())


def _too_large(param: str, size: str) -> InvalidRequestError:
    most = f"{MAX_PIXELS // 1_000_000} megapixels and sides of {MAX_SIDE}"
    return InvalidRequestError(f"'{param}' is {size}; an image may have {most}.", param=param)


def _unreadable(param: str) -> InvalidRequestError:
    return InvalidRequestError(f"'{param}' is not a readable PNG, JPEG or WebP image.", param=param)
