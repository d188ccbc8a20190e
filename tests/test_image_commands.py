"""`hypergen show FILE` and `hypergen generate --from FILE`."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from hypergen.cli.image_commands import repeated_fields, show_file
from hypergen.errors import ConfigurationError
from hypergen.images.encoding import OUTPUT_FORMATS, encode_image
from hypergen.images.saved_settings import read_settings
from hypergen.request import ControlInput, InputImage
from tests.images.test_encoding import noise, request
from tests.test_main import assert_one_line_error, hypergen

_IMAGE = InputImage(64, 64, bytes(3 * 64 * 64))


def rows(output: str) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in output.splitlines())}


def test_a_file_is_shown_and_generated_again(tmp_path: Path) -> None:
    options = ("--steps", "2", "--seed", "7", "--size", "64x64", "--sampler", "DPM++ 2M Karras")
    first = hypergen(tmp_path, "generate", "a red circle", *options, "--device", "cpu", "-o", "a.png")
    assert first.returncode == 0, first.stderr
    shown = rows(hypergen(tmp_path, "show", "a.png").stdout)
    assert shown["prompt"] == "a red circle"
    assert (shown["seed"], shown["num_inference_steps"], shown["sampler"]) == ("7", "2", "dpmpp_2m_karras")
    for arguments in (("-o", "b.png"), ("--seed", "8", "-o", "c.png")):
        again = hypergen(tmp_path, "generate", "--from", "a.png", "--device", "cpu", *arguments)
        assert again.returncode == 0, again.stderr
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    changed = read_settings(tmp_path / "c.png")
    assert changed == {**read_settings(tmp_path / "a.png"), "seed": 8}


def test_unusable_files_are_an_error_of_one_line(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert_one_line_error(hypergen(tmp_path, "show", "plain.png"), "plain.png has no settings")
    edit = encode_image(noise(), request(image=_IMAGE, strength=0.5), 0, "m")
    (tmp_path / "edit.png").write_bytes(edit)
    repeated = hypergen(tmp_path, "generate", "--from", "edit.png", "-o", "a.png")
    assert_one_line_error(repeated, "edit.png", "input image")
    missing = hypergen(tmp_path, "generate", "-o", "a.png")
    assert (missing.returncode, "PROMPT" in missing.stderr) == (2, True)


@pytest.mark.parametrize("output_format", OUTPUT_FORMATS)
def test_the_settings_of_each_format_are_the_fields_of_a_request(tmp_path: Path, output_format: str) -> None:
    file = tmp_path / "image"
    given = request(
        prompt="a\nb, {c} \u5186",
        output_format=output_format,
        output_compression=100 if output_format == "png" else 80,
        clip_skip=2,
        loras=(("style", 0.5),),
    )
    file.write_bytes(encode_image(noise(), given, 0, "owner/name"))
    model, fields = repeated_fields(file, Path(f"again.{output_format}"))
    assert model == "owner/name"
    assert fields["prompt"] == given.prompt
    assert (fields["size"], fields["seed"], fields["clip_skip"]) == ("64x64", 5, 2)
    assert fields["loras"] == {"style": 0.5}
    assert fields.get("output_compression") == (None if output_format == "png" else 80)
    assert "output_compression" not in repeated_fields(file, Path("again.png"))[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": _IMAGE}, "an input image"),
        ({"image": _IMAGE, "mask": InputImage(64, 64, bytes(64 * 64))}, "an input image"),
        ({"control": ControlInput(model="canny", image=_IMAGE)}, "a control image"),
    ],
)
def test_an_edit_cannot_be_repeated(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    file = tmp_path / "edit.png"
    file.write_bytes(encode_image(noise(), request(**changes), 0, "m"))
    with pytest.raises(ConfigurationError, match=words):
        repeated_fields(file, file)


def _jpeg_of_a_camera() -> bytes:
    exif = Image.Exif()
    exif[0x010E] = "[1, 2]"
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (encode_image(noise(), request(metadata=False), 0, "m"), "has no settings"),
        (_jpeg_of_a_camera(), "has no settings"),
        (encode_image(noise(), request(), 0, "m")[:-2000], "not a readable"),
        (encode_image(noise(), request(), 0, "m").replace(b'"seed": 5', b'"seed": 6'), "not a readable"),
        (b"GIF89a", "not a readable"),
        (b"", "not a readable"),
        (None, "No such file"),
    ],
)
def test_a_file_without_settings_is_refused(tmp_path: Path, data: bytes | None, words: str) -> None:
    file = tmp_path / "image.png"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(ConfigurationError, match=words):
        read_settings(file)


def test_control_characters_are_shown_escaped(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(encode_image(noise(), request(prompt="a\x1b[2J\nseed: 1 \u5186"), 0, "m"))
    shown = CliRunner().invoke(show_file, [str(file)]).output
    assert "\x1b" not in shown
    assert rows(shown)["prompt"] == '"a\\u001b[2J\\nseed: 1 \\u5186"'
    assert rows(shown)["seed"] == "5"
