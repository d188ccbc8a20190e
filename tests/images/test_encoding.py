"""Encoding of image files."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypergen.images.encoding import OUTPUT_FORMATS, encode_image
from hypergen.request import ControlInput, GenerationRequest, InputImage


def request(width: int = 64, height: int = 64, **changes: Any) -> GenerationRequest:
    given: dict[str, Any] = {
        "id": "id",
        "prompt": "a red circle",
        "negative_prompt": None,
        "width": width,
        "height": height,
        "num_inference_steps": 20,
        "guidance_scale": 7.5,
        "seed": 5,
        "seed_given": True,
    }
    return GenerationRequest(**{**given, **changes})


def noise(width: int = 64, height: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (72, 40), (8, 1), (1, 8), (1, 1), (2432, 1664)])
def test_a_png_has_exactly_the_given_pixels(width: int, height: int) -> None:
    pixels = noise(width, height)
    data = encode_image(pixels, request(width, height), 0, "m")
    Image.open(BytesIO(data)).verify()  # checksums and chunks
    image = Image.open(BytesIO(data))
    assert (image.format, image.mode) == ("PNG", "RGB")
    assert np.array_equal(np.asarray(image), pixels)


def test_a_larger_image_is_cropped_in_the_middle() -> None:
    pixels = noise(80, 72)
    image = Image.open(BytesIO(encode_image(pixels, request(64, 64), 0, "m")))
    assert np.array_equal(np.asarray(image), pixels[4:68, 8:72])


def test_png_metadata_can_hold_any_characters() -> None:
    prompt = 'ein "roter" Kreis \u2014 \u5186 \U0001f534 \x00 \ud800'
    image = Image.open(BytesIO(encode_image(noise(), request(prompt=prompt), 0, "m")))
    assert json.loads(image.info["hypergen"])["prompt"] == prompt


def test_a_smooth_image_makes_a_small_png() -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 256, 3))
    assert len(encode_image(ramp, request(256, 256), 0, "m")) < 2000


@pytest.mark.parametrize("name", OUTPUT_FORMATS)
def test_a_file_has_the_format_and_media_type_of_its_name(name: str) -> None:
    image = Image.open(BytesIO(encode_image(noise(), request(output_format=name), 0, "m")))
    assert image.format == name.upper()
    assert image.get_format_mimetype() == OUTPUT_FORMATS[name].media_type
    assert image.size == (64, 64)


@pytest.mark.parametrize("name", OUTPUT_FORMATS)
@pytest.mark.parametrize("metadata", [True, False])
def test_encoding_is_deterministic(name: str, metadata: bool) -> None:
    files = {encode_image(noise(), request(output_format=name, metadata=metadata), 0, "m") for _ in range(3)}
    assert len(files) == 1


def test_metadata_of_image_j_is_that_of_a_single_image_with_its_seed() -> None:
    third = encode_image(noise(), request(n=4, id="a", seed_given=False), 2, "m")
    assert third == encode_image(noise(), request(id="b", seed=7), 0, "m")
    assert json.loads(Image.open(BytesIO(third)).info["hypergen"])["seed"] == 7


_INPUT_IMAGE = InputImage(64, 64, bytes(3 * 64 * 64))
# A different value for every field that determines an image.
_CHANGED_VALUES: dict[str, Any] = {
    "prompt": "a blue circle",
    "negative_prompt": "blurred",
    "width": 56,
    "height": 56,
    "num_inference_steps": 21,
    "guidance_scale": 7.0,
    "seed": 6,
    "sampler": "euler",
    "clip_skip": 2,
    "true_cfg_scale": 2.5,
    "prompt_2": "in oil",
    "negative_prompt_2": "blurred",
    "enable_refiner": True,
    "image": InputImage(64, 64, b"\1" * (3 * 64 * 64)),
    "strength": 0.5,
    "mask": InputImage(64, 64, bytes(64 * 64)),
    "control": ControlInput(model="canny", image=_INPUT_IMAGE),
    "loras": (("style", 0.5),),
    "output_compression": 50,
}
# Fields that do not change the pixels, or that the metadata has under another name.
_NOT_IN_METADATA = {
    "id",
    "api_key",
    "seed_given",
    "n",
    "model",
    "output_format",
    "partial_images",
    "metadata",
}


@pytest.mark.parametrize(
    "field", [f.name for f in fields(GenerationRequest) if f.name not in _NOT_IN_METADATA]
)
def test_metadata_has_every_field_that_determines_an_image(field: str) -> None:
    original = request(image=_INPUT_IMAGE, negative_prompt="grainy")
    changed = replace(original, **{field: _CHANGED_VALUES[field]})
    files = [encode_image(noise(), each, 0, "m") for each in (original, changed)]
    metadata = [Image.open(BytesIO(file)).info["hypergen"] for file in files]
    assert metadata[0] != metadata[1]


@pytest.mark.parametrize("name", OUTPUT_FORMATS)
def test_without_metadata_a_file_has_only_pixels(name: str) -> None:
    image = Image.open(BytesIO(encode_image(noise(), request(output_format=name, metadata=False), 0, "m")))
    assert not image.getexif()
    assert not {"exif", "hypergen", "comment"} & set(image.info)


@pytest.mark.parametrize("name", OUTPUT_FORMATS)
@pytest.mark.parametrize("length", [60_000, 64_500, 65_000, 65_536, 200_000])
def test_metadata_of_any_length_gives_a_readable_file(name: str, length: int) -> None:
    data = encode_image(noise(), request(output_format=name, prompt="a" * length), 0, "m")
    Image.open(BytesIO(data)).load()
