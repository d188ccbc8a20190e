"""Reduce input image files to the parts that hold pixels, before Pillow reads them; read their orientation.

Pillow walks through the parts of a file in Python, keeps all metadata, and copies as many bytes per EXIF
entry as the entry claims. So it gets only the parts that pixels need, and a limited number of them.

Sources: ITU-T T.81, annex B; https://www.w3.org/TR/png-3; https://developers.google.com/speed/webp/docs/riff_container;
TIFF 6.0, section 2.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

# A scan of a few bytes visits all coefficients: 25 ms for 40 megapixels. Encoders write about 10 scans.
MAX_SCANS = 100
# Large profiles and depth maps are split into segments of 64 kB; scans have tables.
_MAX_SEGMENTS = 2_000
# Encoders write 8 kB of pixels per chunk.
_MAX_CHUNKS = 50_000

_PNG = b"\x89PNG\r\n\x1a\n"
_EXIF = b"Exif\0\0"
# In entropy-coded data, 0xff is followed by 0 or a restart marker; anything else is a marker.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
# Bytes per search for a marker; between two searches, other threads can take the GIL.
_WINDOW = 1_000_000
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
# SOF0 to SOF2 (baseline, extended, progressive), DHT, SOS, DQT, DNL, DRI.
_PIXEL_SEGMENTS = {0xC0, 0xC1, 0xC2, 0xC4, 0xDA, 0xDB, 0xDC, 0xDD}
_METADATA_SEGMENTS = {*range(0xE0, 0xF0), 0xFE}
# Application segments that determine the colour space: marker code -> first bytes.
_COLOUR_SEGMENTS = {0xE0: b"JFIF", 0xEE: b"Adobe"}


class TooManyPartsError(ValueError):
    """The file has too many parts; the message is the limit, for example "100 scans"."""


def pixels_and_orientation(data: bytes) -> tuple[bytes, int]:
    """The same image without metadata, and its EXIF orientation (1 to 8, 1 is upright).

    WebP is returned unchanged, because its reader takes linear time; so are unknown formats.

    Raises:
        TooManyPartsError: the file has more parts than an encoder writes.
        ValueError: the file is broken.
    """
    if data.startswith(b"\xff\xd8"):
        return _read_jpeg(data)
    if data.startswith(_PNG):
        return _read_png(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        exif = next((chunk for chunk_type, chunk in _webp_chunks(data) if chunk_type == b"EXIF"), b"")
        return data, _orientation(exif)
    return data, 1


def _read_jpeg(data: bytes) -> tuple[bytes, int]:
    view, exif, scans, at = memoryview(data), b"", 0, 2
    kept: list[bytes | memoryview] = [b"\xff\xd8"]
    for _ in range(_MAX_SEGMENTS):
        found = _next_marker(data, at)
        if found is None or found[0][1] == _END_OF_IMAGE:
            return b"".join([*kept, found[0] if found else b""]), _orientation(exif)
        start, code = found.start(), found[0][1]
        at = start + 2 + int.from_bytes(data[start + 2 : start + 4])
        if at < start + 4 or at > len(data):
            raise ValueError("A segment is incomplete.")
        if code == _START_OF_SCAN:
            scans += 1
            if scans > MAX_SCANS:
                raise TooManyPartsError(f"{MAX_SCANS} scans")
            following = _next_marker(data, at)
            at = following.start() if following else len(data)
        has_colour_space = code in _COLOUR_SEGMENTS and data.startswith(_COLOUR_SEGMENTS[code], start + 4)
        if code in _PIXEL_SEGMENTS or has_colour_space:
            kept.append(view[start:at])
        elif code not in _METADATA_SEGMENTS:
            raise ValueError("The frame type is not supported.")
        elif code == 0xE1 and not exif and data.startswith(_EXIF, start + 4):
            exif = data[start + 4 : at]
    raise TooManyPartsError(f"{_MAX_SEGMENTS:,} segments")


def _next_marker(data: bytes, at: int) -> re.Match[bytes] | None:
    for start in range(at, len(data), _WINDOW):
        if found := _MARKER.search(data, start, start + _WINDOW + 1):
            return found
    return None


def _read_png(data: bytes) -> tuple[bytes, int]:
    view = memoryview(data)
    first: dict[bytes, bytes | memoryview] = {}
    pixels: list[memoryview] = []
    for chunk_type, start, end in _png_chunks(data):
        if chunk_type == b"IDAT":
            pixels.append(view[start:end])
        elif chunk_type in (b"IHDR", b"PLTE", b"tRNS"):
            first.setdefault(chunk_type, view[start - 8 : end + 4])
        elif chunk_type == b"eXIf":
            first.setdefault(chunk_type, data[start:end])
    exif = bytes(first.pop(b"eXIf", b""))
    joined = b"".join(pixels)
    checksum = zlib.crc32(joined, zlib.crc32(b"IDAT"))
    parts = [_PNG, *first.values(), len(joined).to_bytes(4), b"IDAT", joined, checksum.to_bytes(4)]
    return b"".join([*parts, b"\0\0\0\0IEND\xaeB`\x82"]), _orientation(exif)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The type of each chunk and the start and end of its data; the last one may be incomplete."""
    at = len(_PNG)
    for _ in range(_MAX_CHUNKS):
        chunk_type, start = data[at + 4 : at + 8], at + 8
        if chunk_type in (b"", b"IEND"):
            return
        end = start + int.from_bytes(data[at : at + 4])
        yield chunk_type, start, min(end, len(data))
        at = end + 4
    raise TooManyPartsError(f"{_MAX_CHUNKS:,} chunks")


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 12
    for _ in range(_MAX_CHUNKS):
        chunk_type = data[at : at + 4]
        if not chunk_type:
            return
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        yield chunk_type, data[at + 8 : at + 8 + length] if chunk_type == b"EXIF" else b""
        at += 8 + length + length % 2
    raise TooManyPartsError(f"{_MAX_CHUNKS:,} chunks")


def _orientation(exif: bytes) -> int:
    """The orientation in the first EXIF directory; 1 if there is none or it is invalid."""
    tiff = exif.removeprefix(_EXIF)
    if tiff[:4] not in (b"II*\0", b"MM\0*"):
        return 1
    order = "little" if tiff.startswith(b"I") else "big"

    def number(at: int, length: int) -> int:
        return int.from_bytes(tiff[at : at + length], order)

    directory = number(4, 4)
    for entry in range(directory + 2, min(directory + 2 + 12 * number(directory, 2), len(tiff)), 12):
        if number(entry, 2) == 0x0112:
            value = number(entry + 8, 4 if number(entry + 2, 2) == 4 else 2)
            return value if 1 <= value <= 8 else 1
    return 1
