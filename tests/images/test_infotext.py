"""A1111's text in image files, read as A1111 and Civitai read it."""

from __future__ import annotations

import json
import re
from io import BytesIO
from typing import Any

import pytest
from PIL import ExifTags, Image

from hypergen import __version__
from hypergen.api.sampler_aliases import schedule_name, split_name
from hypergen.denoising.schedulers import SAMPLERS, SCHEDULES
from hypergen.images.encoding import OUTPUT_FORMATS, encode_image
from hypergen.images.infotext import SAMPLER_NAMES, SCHEDULE_NAMES
from tests.images.test_encoding import noise, request

_VALUE = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
PROMPTS = [
    "a red circle",
    "first line\nsecond line\n\nlast line",
    "ein grüner Kreis",
    "円, 🔴 и круг",
    '{"prompt": "x"}, [a:b:0.5], (c:1.2), "quoted", \\(d\\)',
]


def text_of(data: bytes) -> str:
    image = Image.open(BytesIO(data))
    if image.format == "PNG":
        return image.info["parameters"]
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be")


def encoded(model: str = "m", output_format: str = "png", **changes: Any) -> bytes:
    return encode_image(noise(), request(output_format=output_format, **changes), 0, model)


def parse(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and values by A1111's grammar."""
    *lines, last = text.strip().split("\n")
    start = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[start:]).removeprefix("Negative prompt:").strip()
    values = {key: json.loads(value) if value[:1] == '"' else value for key, value in _VALUE.findall(last)}
    return "\n".join(lines[:start]), negative, values


@pytest.mark.parametrize("output_format", OUTPUT_FORMATS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_and_values_are_read_from_each_format(output_format: str, prompt: str) -> None:
    given = {"prompt": prompt, "negative_prompt": prompt[::-1], "sampler": "dpmpp_2m_karras", "clip_skip": 2}
    text = text_of(encoded("owner/name", output_format, **given))
    expected = {
        "Steps": "20",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "7.5",
        "Seed": "5",
        "Size": "64x64",
        "Model": "owner/name",
        "Clip skip": "2",
        "Version": f"HyperGen {__version__}",
    }
    assert parse(text) == (prompt, prompt[::-1], expected)


def test_the_text_is_that_of_a1111() -> None:
    text = text_of(encoded(sampler="euler_a", guidance_scale=7.0, negative_prompt="blurred"))
    values = (
        "Steps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: 5, Size: 64x64, Model: m"
    )
    assert text == f"a red circle\nNegative prompt: blurred\n{values}, Version: HyperGen {__version__}"


def test_the_models_own_scheduler_has_no_name() -> None:
    assert not {"Sampler", "Schedule type"} & parse(text_of(encoded()))[2].keys()


def test_loras_are_in_the_prompt_and_distilled_guidance_has_a_name_of_its_own() -> None:
    text = text_of(
        encoded(
            loras=(("style", 0.5), ("folder/ink", 1.0)),
            negative_prompt="x",
            guidance_scale=3.5,
            true_cfg_scale=4.0,
        )
    )
    prompt, _, values = parse(text)
    assert prompt == "a red circle <lora:style:0.5> <lora:folder/ink:1>"
    assert (values["CFG scale"], values["Distilled CFG Scale"]) == ("4", "3.5")


@pytest.mark.parametrize(
    "model", ["name:version", 'a, Seed: 9, Model: "b"', "a\nSteps: 1, Seed: 9, Size: 8x8"]
)
def test_a_value_is_quoted(model: str) -> None:
    values = parse(text_of(encoded(model)))[2]
    assert (values["Model"], values["Seed"]) == (model, "5")


@pytest.mark.parametrize(
    "forged",
    [
        "a\nNegative prompt: b",
        "a negative prompt: b",
        "a\nSteps: 1, Sampler: Euler, CFG scale: 1, Seed: 9, Size: 8x8",
        "a\rSteps: 1, Seed: 9\u2028Negative prompt: b",
    ],
)
@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_prompt_cannot_pass_for_other_settings(field: str, forged: str) -> None:
    text = text_of(encoded(**{"negative_prompt": "grainy", field: forged}))
    # Civitai splits at the separators wherever they are.
    assert text.lower().count("negative prompt:") == text.lower().count("steps:") == 1
    prompt, negative, values = parse(text)
    assert values["Seed"] == "5"
    assert (prompt, negative)[field == "negative_prompt"].replace(" :", ":") == forged
    assert json.loads(Image.open(BytesIO(encoded(prompt=forged))).info["hypergen"])["prompt"] == forged


@pytest.mark.parametrize("output_format", OUTPUT_FORMATS)
def test_characters_without_an_encoding_are_replaced(output_format: str) -> None:
    prompt, _, values = parse(text_of(encoded(output_format=output_format, prompt="a\0b\ud800c")))
    assert prompt == "a\ufffdb\ufffdc"
    assert values["Seed"] == "5"


def test_each_sampler_and_schedule_has_a_name_that_requests_accept() -> None:
    assert SAMPLER_NAMES.keys() == SAMPLERS.keys()
    assert {name: split_name(shown) for name, shown in SAMPLER_NAMES.items()} == {
        name: (name, None) for name in SAMPLERS
    }
    assert SCHEDULE_NAMES.keys() == SCHEDULES.keys()
    assert {name: schedule_name(shown) for name, shown in SCHEDULE_NAMES.items()} == {n: n for n in SCHEDULES}


@pytest.mark.parametrize(
    ("length", "has_settings", "has_text"),
    [(20_000, True, True), (40_000, True, False), (66_000, False, False)],
)
def test_a_jpeg_has_what_fits_into_its_segment(length: int, has_settings: bool, has_text: bool) -> None:
    exif = Image.open(BytesIO(encoded(output_format="jpeg", prompt="a" * length))).getexif()
    assert (ExifTags.Base.ImageDescription in exif, ExifTags.IFD.Exif in exif) == (has_settings, has_text)


@pytest.mark.parametrize("output_format", OUTPUT_FORMATS)
def test_the_metadata_changes_no_pixel(output_format: str) -> None:
    files = [encoded(output_format=output_format, metadata=metadata) for metadata in (True, False)]
    pixels = [Image.open(BytesIO(file)).tobytes() for file in files]
    assert pixels[0] == pixels[1]
    assert b"parameters" not in files[1]
