"""The commands and the example of the README, run unchanged."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.support.live_server import LiveServer, start_server

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def embedded_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The embedded model, served by the README's command."""
    with start_server(tmp_path_factory.mktemp("readme"), program=[str(ROOT / "scripts" / "serve")]) as server:
        yield server


def example() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return code


def colour(image: Image.Image, x: float, y: float) -> tuple[int, int, int]:
    """The colour at a position, given as fractions of width and height."""
    pixel = image.convert("RGB").getpixel((int(x * (image.width - 1)), int(y * (image.height - 1))))
    assert isinstance(pixel, tuple)
    return pixel[0], pixel[1], pixel[2]


def is_red(pixel: tuple[int, int, int]) -> bool:
    return pixel[0] > 150 and max(pixel[1:]) < 100


def is_blue(pixel: tuple[int, int, int]) -> bool:
    return pixel[2] > 150 and max(pixel[:2]) < 120


def test_the_example_generates_a_red_circle_on_a_blue_background(
    embedded_server: LiveServer, tmp_path: Path
) -> None:
    code = example()
    assert len(code.strip().splitlines()) <= 11  # a ten-line example and its blank line
    code = code.replace("http://127.0.0.1:8000", embedded_server.url)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    with Image.open(tmp_path / "circle.png") as image:
        assert image.size == (256, 256)
        assert is_red(colour(image, 0.5, 0.5))
        assert all(is_blue(colour(image, x, y)) for x in (0.02, 0.98) for y in (0.02, 0.98))


def test_a_large_image_has_the_requested_size_and_shows_the_prompt(embedded_server: LiveServer) -> None:
    """Generated at the nearest native size and resized."""
    import base64
    from io import BytesIO

    result = embedded_server.openai().images.generate(
        prompt="a red circle on a blue background", size="1024x1024", extra_body={"seed": 9}
    )
    assert result.data
    with Image.open(BytesIO(base64.b64decode(result.data[0].b64_json or ""))) as image:
        assert image.size == (1024, 1024)
        assert is_red(colour(image, 0.5, 0.5))
        assert is_blue(colour(image, 0.02, 0.02))


def test_the_embedded_model_is_served_by_default(embedded_server: LiveServer) -> None:
    assert embedded_server.openai().models.list().data[0].id == "hypergen-tiny"
    assert embedded_server.health()["engines"][0]["determinism"].keys() >= {"256x256"}


def test_both_commands_are_in_the_readme_and_have_a_description() -> None:
    for name in ("serve", "test"):
        assert f"scripts/{name} " in README
        second_line = (ROOT / "scripts" / name).read_text(encoding="utf-8").splitlines()[1]
        assert second_line.startswith("# ")
