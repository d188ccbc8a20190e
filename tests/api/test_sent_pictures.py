"""Input images, from the bytes of a file to pixels of the requested size."""

from __future__ import annotations

import subprocess
import sys
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from hypergen.errors import InvalidRequestError
from hypergen.images.decoding import decode, from_base64, to_input_image, to_mask
from hypergen.request import InputImage
from tests.support.image_files import (
    BROKEN,
    as_base64,
    as_data_url,
    as_file,
    gradient,
    png_header,
    png_of,
    with_png_chunk,
)

ORIENTATION = 0x0112


def pixels(input_image: InputImage, channels: int = 3) -> np.ndarray:
    shape = (input_image.height, input_image.width, channels)
    return np.frombuffer(input_image.pixels, np.uint8).reshape(shape).astype(int)


def difference(input_image: InputImage, image: Image.Image) -> float:
    return float(np.abs(pixels(input_image) - np.asarray(image.convert("RGB"), int)).mean())


@pytest.mark.parametrize(("image_format", "max_difference"), [("PNG", 0), ("JPEG", 3), ("WEBP", 3)])
def test_the_file_type_is_detected_by_the_bytes(image_format: str, max_difference: float) -> None:
    input_image = to_input_image(decode(as_file(gradient(), image_format), "image"), 96, 64)
    assert difference(input_image, gradient()) <= max_difference


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_an_unreadable_image_is_rejected_with_its_param(data: bytes) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        decode(data, "mask")
    assert raised.value.param == "mask"
    assert "'mask'" in raised.value.message


@pytest.mark.parametrize("size", [(8000, 5130), (10_000, 10_000), (30_000, 30_000), (8, 1_000_000)])
def test_a_too_large_image_is_rejected(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidRequestError, match="40 megapixels and 8192 pixels"):
        decode(png_header(*size), "image")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1"])
def test_common_image_modes_are_decoded(mode: str) -> None:
    image_format = "JPEG" if mode == "CMYK" else "PNG"
    image = gradient(mode=mode)
    input_image = to_input_image(decode(as_file(image, image_format), "image"), 96, 64)
    assert difference(input_image, image) < 3


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 96 * 64).reshape(64, 96).astype(np.uint16)
    input_image = to_input_image(decode(as_file(Image.fromarray(ramp)), "image"), 96, 64)
    assert np.abs(pixels(input_image)[:, :, 0] - ramp / 257).max() <= 1


def _words(*values: int) -> bytes:
    return b"".join(value.to_bytes(2) for value in values)


@pytest.mark.parametrize(
    ("png", "transparent_value", "expected"),
    [
        # The low byte of the value is 48, which once made the second pixel white.
        (png_of(3, 1, 16, 0, [_words(30000, 48 * 257, 30001)]), _words(30000), [255, 48, 116]),
        (png_of(2, 1, 16, 0, [_words(30000, 48 * 257)]), _words(31000), [116, 48]),
        (png_of(4, 1, 4, 0, [bytes([0x01, 0x2F])]), _words(2), [0, 17, 255, 255]),
        (png_of(4, 1, 2, 0, [bytes([0b00_01_10_11])]), _words(1), [0, 255, 170, 255]),
        (png_of(3, 1, 8, 0, [bytes([0, 1, 2])]), _words(1), [0, 255, 2]),
        (png_of(2, 1, 16, 2, [_words(30000, 0, 9, 0x3000, 7, 7)]), _words(30000, 0, 9), [255, 48]),
    ],
    ids=["16 bits", "16 bits, not in the image", "4 bits", "2 bits", "8 bits", "16 bits, RGB"],
)
def test_the_transparent_value_of_a_png_has_the_bit_depth_of_the_file(
    png: bytes, transparent_value: bytes, expected: list[int]
) -> None:
    image = decode(with_png_chunk(png, b"tRNS", transparent_value), "image")
    opaque = Image.new("RGBA", image.size, "white")
    opaque.alpha_composite(image)
    assert np.asarray(opaque)[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("chunk_type", "start"), [(b"iCCP", b"x\0\0"), (b"zTXt", b"workflow\0\0"), (b"iTXt", b"x\0\1\0\0\0")]
)
def test_large_compressed_metadata_of_a_png_is_skipped(chunk_type: bytes, start: bytes) -> None:
    """Pillow refuses more than 1 MiB of it."""
    png = with_png_chunk(as_file(gradient()), chunk_type, start + zlib.compress(bytes(2_000_000)))
    with pytest.raises(ValueError, match="Decompressed data too large"):
        Image.open(BytesIO(png)).load()
    assert difference(to_input_image(decode(png, "image"), 96, 64), gradient()) == 0


def test_transparent_pixels_become_white() -> None:
    image = Image.new("RGBA", (64, 64), (200, 0, 0, 0))
    image.paste((10, 20, 30, 255), (0, 0, 32, 64))
    values = pixels(to_input_image(decode(as_file(image), "image"), 64, 64))
    assert values[0, 0].tolist() == [10, 20, 30]
    assert values[0, 63].tolist() == [255, 255, 255]


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_the_exif_orientation_is_applied(image_format: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # rotated by 90 degrees, as phones store portrait photos
    rotated = as_file(gradient().rotate(90, expand=True), image_format, exif=exif.tobytes())
    image = decode(rotated, "image")
    assert image.size == (96, 64)
    assert difference(to_input_image(image, 96, 64), gradient()) < 4


def test_broken_exif_is_ignored() -> None:
    data = as_file(gradient(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 40)
    assert decode(data, "image").size == (96, 64)


def test_the_first_frame_of_an_animation_is_used() -> None:
    frames = [gradient(), Image.new("RGB", (96, 64), "white")]
    for image_format in ("PNG", "WEBP"):
        data = as_file(frames[0], image_format, save_all=True, append_images=frames[1:])
        assert difference(to_input_image(decode(data, "image"), 96, 64), gradient()) < 3


def test_an_image_with_another_aspect_ratio_is_center_cropped() -> None:
    resized = pixels(to_input_image(gradient(200, 100), 64, 64))
    middle = pixels(to_input_image(gradient(200, 100).crop((50, 0, 150, 100)), 64, 64))
    assert np.array_equal(resized, middle)


def test_pixels_are_unchanged_if_only_the_edge_is_cropped() -> None:
    image = Image.effect_noise((101, 79), 90).convert("RGB")
    resized = pixels(to_input_image(image, 96, 72))
    assert np.array_equal(resized, np.asarray(image)[3:75, 2:98])


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3000, 20)])
def test_every_size_can_be_resized(size: tuple[int, int]) -> None:
    assert len(to_input_image(Image.new("RGB", size, "red"), 64, 72).pixels) == 64 * 72 * 3


def test_transparent_pixels_are_generated_and_opaque_pixels_kept() -> None:
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((255, 255, 255, 0), (0, 0, 32, 64))
    values = pixels(to_mask(decode(as_file(mask), "mask"), 128, 128), 1)
    assert values[:, :58].min() == 255
    assert values[:, 70:].max() == 0


def test_semi_transparent_pixels_are_blended() -> None:
    mask = decode(as_file(Image.new("RGBA", (8, 8), (0, 0, 0, 100))), "mask")
    assert set(to_mask(mask, 64, 64).pixels) == {155}


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P"])
def test_without_transparency_white_is_generated_and_black_kept(mode: str) -> None:
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 64, 32))
    values = pixels(to_mask(decode(as_file(mask.convert(mode)), "mask"), 64, 64), 1)
    assert values[:32].min() == 255
    assert values[32:].max() == 0


def test_an_opaque_mask_with_an_alpha_channel_keeps_everything() -> None:
    mask = decode(as_file(Image.new("RGBA", (8, 8), "white")), "mask")
    assert pixels(to_mask(mask, 8, 8), 1).max() == 0


def test_base64_may_be_bare_a_data_url_or_split_into_lines() -> None:
    data = as_file(gradient())
    bare = as_base64(data)
    lines = "\r\n".join(bare[start : start + 76] for start in range(0, len(bare), 76))
    for text in (
        bare,
        lines,
        as_data_url(data),
        as_data_url(data, "image/x;name=a.png"),
        "DATA:;base64," + bare,
    ):
        assert from_base64(text, "image") == data


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1/x.png",
        "https://example.com/x.png",
        "HTTP://[::1]/",
        "file:///etc/passwd",
        "ftp://x/y",
        "data:image/png,abc",
        "data:text/plain;base64",
        "a",
        "abc",
        "äöü",
        "a_-=",
        "\ud800",
        "YWJj!",
    ],
)
def test_other_text_is_rejected_and_nothing_is_fetched(text: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        from_base64(text, "image")
    assert raised.value.param == "image"


def test_images_are_decoded_without_torch() -> None:
    program = "import sys, hypergen.images.decoding; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
