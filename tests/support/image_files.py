"""Image files that tests send."""

from __future__ import annotations

import base64
import zlib
from io import BytesIO
from typing import Any

from PIL import Image


def gradient(width: int = 96, height: int = 64, mode: str = "RGB") -> Image.Image:
    """An image without symmetry: red increases to the right, green downwards."""
    red = Image.linear_gradient("L").rotate(90).resize((width, height))
    green = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", (red, green, Image.new("L", (width, height), 40))).convert(mode)


def as_file(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def as_data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{as_base64(data)}"


def png_chunk(chunk_type: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(chunk_type + data)
    return len(data).to_bytes(4) + chunk_type + data + checksum.to_bytes(4)


def with_png_chunk(png: bytes, chunk_type: bytes, data: bytes) -> bytes:
    """The PNG with another chunk before its pixels."""
    end_of_header = 33
    return png[:end_of_header] + png_chunk(chunk_type, data) + png[end_of_header:]


def png_of(width: int, height: int, bit_depth: int, colour_type: int, rows: list[bytes]) -> bytes:
    """A PNG of any bit depth, of which Pillow writes only some.

    Args:
        rows: the bytes of each row; none for a file without pixels.
    """
    header = width.to_bytes(4) + height.to_bytes(4) + bytes((bit_depth, colour_type, 0, 0, 0))
    unfiltered = b"".join(b"\0" + row for row in rows)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(unfiltered))
        + png_chunk(b"IEND", b"")
    )


def png_header(width: int, height: int) -> bytes:
    """A PNG with a header of any size but no pixels."""
    return png_of(width, height, 8, 2, [])


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "text": b"not an image",
    "truncated png": as_file(gradient())[:-300],
    "truncated jpeg": as_file(gradient(200, 200), "JPEG")[:2000],
    "truncated webp": as_file(gradient(200, 200), "WEBP")[:500],
    "only a signature": b"\x89PNG\r\n\x1a\n",
    "gif": as_file(gradient(), "GIF"),
    "bmp": as_file(gradient(), "BMP"),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
    "decompression bomb": png_header(30_000, 30_000),
    "41 megapixels": png_header(8000, 5130),
    "2^31 pixels wide": png_header(2**31 - 1, 1),
    "long line": png_header(1_000_000, 8),
    "no pixels": png_header(0, 0),
}
