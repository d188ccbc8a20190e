"""Input images that are built to use much time or memory."""

from __future__ import annotations

import contextvars
import struct
import threading
import zlib
from collections.abc import Callable
from io import BytesIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from hypergen.images.decoding import (
    DecodingCancelledError,
    check_header,
    decode,
    decoding_cancelled,
    to_input_image,
    to_mask,
)
from hypergen.images.image_files import pixels_and_orientation
from tests.support.image_files import as_file, gradient
from tests.support.parser_costs import growth, memory, refusal

JPEG = as_file(gradient(), "JPEG")
PROGRESSIVE = as_file(gradient(), "JPEG", progressive=True)
PNG = as_file(gradient())
WEBP = as_file(gradient(), "WEBP")
FILES = {"jpeg": JPEG, "progressive jpeg": PROGRESSIVE, "png": PNG, "webp": WEBP}


def segment(code: int, data: bytes = b"") -> bytes:
    return bytes((0xFF, code)) + (len(data) + 2).to_bytes(2) + data


def chunk(chunk_type: bytes, data: bytes = b"") -> bytes:
    return len(data).to_bytes(4) + chunk_type + data + zlib.crc32(chunk_type + data).to_bytes(4)


def in_jpeg(segments: bytes) -> bytes:
    return JPEG[:2] + segments + JPEG[2:]


def in_png(chunks: bytes) -> bytes:
    """A PNG with these chunks after its header."""
    return PNG[:33] + chunks + PNG[33:]


def in_webp(chunks: bytes) -> bytes:
    size = (95).to_bytes(3, "little") + (63).to_bytes(3, "little")
    body = b"WEBPVP8X" + (10).to_bytes(4, "little") + b"\x08\0\0\0" + size + WEBP[12:] + chunks
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def webp_chunk(chunk_type: bytes, data: bytes = b"") -> bytes:
    return chunk_type + len(data).to_bytes(4, "little") + data + b"\0" * (len(data) % 2)


def with_scans(scans: int, start: bytes = PROGRESSIVE) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    last = start[start.rindex(b"\xff\xda") : -2]
    return start[:-2] + last * (scans - start.count(b"\xff\xda")) + start[-2:]


def directory(entries: list[tuple[int, int, int, int]], order: str = "<") -> bytes:
    """EXIF data with a tag, type, count and value per entry."""
    packed = b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries)
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(f"{order}IH", 8, len(entries)) + packed + bytes(4)


def message(data: bytes) -> str:
    error = refusal(lambda: decode(data, "mask"))
    assert error is not None
    assert error.param == "mask"
    return error.message


def test_a_jpeg_with_100_scans_is_decoded_and_with_101_rejected_before_decoding() -> None:
    assert decode(with_scans(100), "mask").size == (96, 64)
    assert message(with_scans(101)) == "'mask' has more than 100 scans; save the image again."
    assert refusal(lambda: check_header(with_scans(101), "mask"))


def test_scans_of_a_thumbnail_do_not_count() -> None:
    thumbnail = segment(0xE1, b"Exif\0\0" + b"\xff\xda\0\2" * 1000) + segment(0xFE, b"\xff\xda\0\2" * 1000)
    assert decode(in_jpeg(thumbnail), "image").size == (96, 64)


def test_a_jpeg_may_have_2000_segments() -> None:
    assert decode(in_jpeg(segment(0xE5) * 1900), "image").size == (96, 64)
    assert (
        message(in_jpeg(segment(0xE5) * 2000)) == "'mask' has more than 2,000 segments; save the image again."
    )
    assert "segments" in message(in_jpeg(segment(0xFE) * 1_000_000))


@pytest.mark.parametrize("chunk_type", [b"abCd", b"tEXt", b"IDAT"])
def test_a_png_may_have_50_000_chunks(chunk_type: bytes) -> None:
    assert decode(in_png(chunk(chunk_type) * 49_000), "image").size == (96, 64)
    assert (
        message(in_png(chunk(chunk_type) * 50_000))
        == "'mask' has more than 50,000 chunks; save the image again."
    )
    behind = PNG[:-12] + chunk(chunk_type) * 50_000 + PNG[-12:]
    assert "chunks" in message(behind)


def test_a_webp_may_have_50_000_chunks() -> None:
    assert decode(in_webp(webp_chunk(b"abcd") * 49_000), "image").size == (96, 64)
    assert "50,000 chunks" in message(in_webp(webp_chunk(b"abcd") * 50_000))


def test_a_png_with_chunks_of_one_byte_decodes_to_the_same_pixels() -> None:
    pixels = PNG[PNG.index(b"IDAT") + 4 : -16]
    split = b"".join(chunk(b"IDAT", pixels[at : at + 1]) for at in range(len(pixels)))
    data = PNG[: PNG.index(b"IDAT") - 4] + split + PNG[-12:]
    assert decode(data, "image").tobytes() == gradient().tobytes()


def test_compressed_text_of_a_png_is_not_decompressed() -> None:
    bomb = PngImagePlugin.PngInfo()
    bomb.add_text("a", "0" * 100_000_000, zip=True)
    data = as_file(gradient(), pnginfo=bomb)
    assert memory(lambda data: decode(data, "image"), data) < 6
    assert decode(data, "image").tobytes() == gradient().tobytes()


def test_a_second_image_after_a_jpeg_is_ignored() -> None:
    file = BytesIO()
    gradient().save(file, "MPO", save_all=True, append_images=[Image.new("RGB", (64, 96))] * 200)
    image = decode(file.getvalue(), "image")
    assert image.tobytes() == decode(JPEG, "image").tobytes()


@pytest.mark.parametrize("entries", [1, 20, 5000])
@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_with_entries_that_claim_20_mb_each_uses_no_memory_and_is_applied(
    entries: int, order: str
) -> None:
    turned = 6 if order == "<" else 6 << 16
    exif = directory(
        [(0x9000 + at, 1, 20_000_000, 8) for at in range(entries)] + [(0x0112, 3, 1, turned)], order
    )
    for data in (
        in_jpeg(segment(0xE1, b"Exif\0\0" + exif)),
        in_png(chunk(b"eXIf", exif)),
        in_webp(webp_chunk(b"EXIF", exif)),
    ):
        assert decode(data, "image").size == (64, 96)
        assert memory(lambda data: decode(data, "image"), data + bytes(100_000)) < 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied_as_in_pillow(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = as_file(gradient(), exif=exif.tobytes())
    image = Image.open(BytesIO(data))
    assert decode(data, "image").tobytes() == ImageOps.exif_transpose(image).tobytes()


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b""]))
def test_exif_of_arbitrary_bytes_gives_an_orientation(exif: bytes, start: bytes) -> None:
    assert 1 <= pixels_and_orientation(in_png(chunk(b"eXIf", start + exif)))[1] <= 8
    assert decode(in_jpeg(segment(0xE1, b"Exif\0\0" + start + exif)), "image")


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.data())
def test_arbitrary_bytes_are_decoded_or_rejected_with_their_param(data: st.DataObject) -> None:
    """Files in which a range is removed or replaced by arbitrary bytes."""
    file = data.draw(st.sampled_from(list(FILES.values())))
    start = data.draw(st.integers(0, len(file)))
    end = data.draw(st.integers(start, min(len(file), start + 50)))
    changed = file[:start] + data.draw(st.binary(max_size=50)) + file[end:]
    error = refusal(lambda: decode(changed, "mask"))
    assert error is None or (error.param == "mask" and "'mask'" in error.message)


HOSTILE: dict[str, Callable[[int], bytes]] = {
    "filling before a marker": lambda size: in_jpeg(b"\xff" * size),
    "bytes between segments": lambda size: in_jpeg(segment(0xFE) + bytes(size)),
    "escaped bytes": lambda size: JPEG[:-2] + b"\xff\0" * (size // 2),
    "restarts": lambda size: JPEG[:-2] + b"\xff\xd0" * (size // 2),
    "segments": lambda size: in_jpeg(segment(0xE1, b"Exif\0\0") * (size // 10)),
    "large segments": lambda size: in_jpeg(segment(0xE1, b"Exif\0\0".ljust(60_000, b"x")) * (size // 60_000)),
    "chunks": lambda size: in_png(chunk(b"tEXt") * (size // 12)),
    "large chunks": lambda size: in_png(chunk(b"eXIf", directory([]) + bytes(1000)) * (size // 1000)),
    "webp chunks": lambda size: in_webp(webp_chunk(b"EXIF") * (size // 8)),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_decoding_takes_time_and_memory_proportional_to_the_file_size(make: Callable[[int], bytes]) -> None:
    assert growth(lambda data: decode(data, "image"), make, 1_000_000) < 3
    assert memory(lambda data: decode(data, "image"), make(1_000_000)) < 6


class CountedEvent(threading.Event):
    """An event that is set after `is_set` was called this many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self._left = times

    def is_set(self) -> bool:
        self._left -= 1
        return self._left < 0


@pytest.mark.parametrize(
    "step",
    [
        lambda: check_header(PNG, "image"),
        lambda: decode(PNG, "image"),
        lambda: to_input_image(gradient(), 64, 64),
        lambda: to_mask(gradient(), 64, 64),
    ],
    ids=["check_header", "decode", "to_input_image", "to_mask"],
)
def test_every_step_stops_when_decoding_is_cancelled(step: Callable[[], object]) -> None:
    cancelled = threading.Event()

    def run() -> object:
        decoding_cancelled.set(cancelled)
        return step()

    assert contextvars.copy_context().run(run)
    cancelled.set()
    with pytest.raises(DecodingCancelledError):
        contextvars.copy_context().run(run)
    assert step()


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_decoding_can_be_cancelled_after_every_64_kb(image_format: str) -> None:
    """A file of 3 MB is read in more than 40 blocks; decoding stops after each, if it is cancelled then."""
    data = as_file(Image.effect_noise((2000, 1500), 90), image_format, quality=100)

    def stopped(after: int) -> bool:
        decoding_cancelled.set(CountedEvent(after))
        try:
            decode(data, "image")
        except DecodingCancelledError:
            return True
        return False

    assert all(contextvars.copy_context().run(stopped, after) for after in range(len(data) // 65_536))
    assert not contextvars.copy_context().run(stopped, 1_000_000)


def test_decoding_without_a_cancel_event_is_not_cancelled() -> None:
    assert decoding_cancelled.get() is None
    assert decode(PNG, "image")
