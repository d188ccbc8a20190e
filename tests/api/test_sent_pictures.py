"""Pictures that clients send, from bytes to pixels of the asked size."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from hypergen.errors import InvalidRequestError
from hypergen.images.decoding import decode, from_base64, to_input_image, to_mask
from hypergen.request import InputImage
from tests.support.image_files import BROKEN, as_base64, as_data_url, as_file, gradient, png_header

ORIENTATION = 0x0112


def pixels(picture: InputImage, channels: int = 3) -> np.ndarray:
    shape = (picture.height, picture.width, channels)
    return np.frombuffer(picture.pixels, np.uint8).reshape(shape).astype(int)


def difference(picture: InputImage, image: Image.Image) -> float:
    return float(np.abs(pixels(picture) - np.asarray(image.convert("RGB"), int)).mean())


@pytest.mark.parametrize(("kind", "least"), [("PNG", 0), ("JPEG", 3), ("WEBP", 3)])
def test_the_file_type_is_told_by_the_bytes(kind: str, least: float) -> None:
    picture = to_input_image(decode(as_file(gradient(), kind), "image"), 96, 64)
    assert difference(picture, gradient()) <= least


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_what_is_no_readable_picture_is_refused_by_its_parameter(data: bytes) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        decode(data, "mask")
    assert raised.value.param == "mask"
    assert "'mask'" in raised.value.message


@pytest.mark.parametrize("size", [(8000, 5130), (10_000, 10_000), (30_000, 30_000), (8, 1_000_000)])
def test_what_is_too_large_is_refused_for_its_size(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidRequestError, match="40 megapixels and 8192 pixels"):
        decode(png_header(*size), "image")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1"])
def test_ordinary_kinds_of_pictures_are_read(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    image = gradient(mode=mode)
    picture = to_input_image(decode(as_file(image, kind), "image"), 96, 64)
    assert difference(picture, image) < 3


def test_sixteen_bits_of_grey_are_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 96 * 64).reshape(64, 96).astype(np.uint16)
    picture = to_input_image(decode(as_file(Image.fromarray(ramp)), "image"), 96, 64)
    assert np.abs(pixels(picture)[:, :, 0] - ramp / 257).max() <= 1


def test_transparent_pixels_become_white() -> None:
    image = Image.new("RGBA", (64, 64), (200, 0, 0, 0))
    image.paste((10, 20, 30, 255), (0, 0, 32, 64))
    seen = pixels(to_input_image(decode(as_file(image), "image"), 64, 64))
    assert seen[0, 0].tolist() == [10, 20, 30]
    assert seen[0, 63].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_turned_upright_by_their_orientation(kind: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # turned a quarter, as phones store upright photographs
    lying = as_file(gradient().rotate(90, expand=True), kind, exif=exif.tobytes())
    image = decode(lying, "image")
    assert image.size == (96, 64)
    assert difference(to_input_image(image, 96, 64), gradient()) < 4


def test_broken_exif_does_not_spoil_a_picture() -> None:
    data = as_file(gradient(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 40)
    assert decode(data, "image").size == (96, 64)


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [gradient(), Image.new("RGB", (96, 64), "white")]
    for kind in ("PNG", "WEBP"):
        data = as_file(frames[0], kind, save_all=True, append_images=frames[1:])
        assert difference(to_input_image(decode(data, "image"), 96, 64), gradient()) < 3


def test_a_picture_of_another_shape_is_cut_and_not_distorted() -> None:
    fitted = pixels(to_input_image(gradient(200, 100), 64, 64))
    middle = pixels(to_input_image(gradient(200, 100).crop((50, 0, 150, 100)), 64, 64))
    assert np.array_equal(fitted, middle)


def test_pixels_stay_as_they_are_where_only_the_edge_is_cut() -> None:
    image = Image.effect_noise((101, 79), 90).convert("RGB")
    fitted = pixels(to_input_image(image, 96, 72))
    assert np.array_equal(fitted, np.asarray(image)[3:75, 2:98])


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3000, 20)])
def test_every_size_can_be_fitted(size: tuple[int, int]) -> None:
    assert len(to_input_image(Image.new("RGB", size, "red"), 64, 72).pixels) == 64 * 72 * 3


def test_transparent_is_drawn_and_opaque_is_kept() -> None:
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((255, 255, 255, 0), (0, 0, 32, 64))
    seen = pixels(to_mask(decode(as_file(mask), "mask"), 128, 128), 1)
    assert seen[:, :58].min() == 255
    assert seen[:, 70:].max() == 0


def test_half_transparent_is_half_drawn() -> None:
    mask = decode(as_file(Image.new("RGBA", (8, 8), (0, 0, 0, 100))), "mask")
    assert set(to_mask(mask, 64, 64).pixels) == {155}


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P"])
def test_without_transparency_white_is_drawn_and_black_is_kept(mode: str) -> None:
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 64, 32))
    seen = pixels(to_mask(decode(as_file(mask.convert(mode)), "mask"), 64, 64), 1)
    assert seen[:32].min() == 255
    assert seen[32:].max() == 0


def test_an_opaque_mask_with_an_alpha_channel_keeps_everything() -> None:
    mask = decode(as_file(Image.new("RGBA", (8, 8), "white")), "mask")
    assert pixels(to_mask(mask, 8, 8), 1).max() == 0


def test_base64_is_read_bare_as_a_data_url_and_in_lines() -> None:
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
def test_other_text_is_refused_and_nothing_is_fetched(text: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        from_base64(text, "image")
    assert raised.value.param == "image"


def test_pictures_are_read_without_torch() -> None:
    program = "import sys, hypergen.images.decoding; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
