"""The examples, run as their first lines describe, against a server with the embedded model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.live_server import LiveServer
from tests.support.packages import ROOT, node_packages
from tests.test_readme import colour, is_blue, is_red

EXAMPLES = ROOT / "examples"
SMALL = ("--size", "128x128", "--steps", "8")


@pytest.fixture(scope="module")
def server(documented_server: LiveServer) -> LiveServer:
    return documented_server


def run(server: LiveServer, folder: Path, *command: str, **environment: str) -> str:
    """Run an example in the folder; returns what it printed."""
    variables = {**os.environ, "BASE_URL": server.url, "API_KEY": str(server.api_key), **environment}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def python(server: LiveServer, folder: Path, name: str, *options: str) -> str:
    return run(server, folder, sys.executable, str(EXAMPLES / name), *options)


def open_image(file: Path, size: tuple[int, int] = (128, 128)) -> Image.Image:
    with Image.open(file) as image:
        assert image.size == size
        return image.convert("RGB")


def is_red_on_blue(image: Image.Image) -> bool:
    """Whether a tenth to a quarter of the image is red, and most of the rest is blue."""
    small = image.resize((32, 32))
    colours = [colour(small, x / 31, y / 31) for x in range(32) for y in range(32)]
    red, blue = (sum(map(check, colours)) / len(colours) for check in (is_red, is_blue))
    return 0.1 < red < 0.25 and blue > 0.6


def test_the_python_client_generates_an_image(server: LiveServer, tmp_path: Path) -> None:
    printed = python(server, tmp_path, "python_client.py", *SMALL)
    assert "The server has stabilityai/stable-diffusion-xl-base-1.0." in printed
    assert "Wrote image.png, 128x128, seed 14." in printed
    image = open_image(tmp_path / "image.png")
    assert is_red_on_blue(image)


def test_the_python_client_shows_the_error(server: LiveServer, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"size: .*Invalid size format"):
        python(server, tmp_path, "python_client.py", "--size", "large")


def test_the_node_client_generates_an_image(server: LiveServer, tmp_path: Path) -> None:
    node = node_packages(EXAMPLES)
    script = str(EXAMPLES / "node_client.mjs")
    printed = run(
        server, tmp_path, node, script, "a red circle on a blue background", SIZE="128x128", STEPS="8"
    )
    assert "The server has stabilityai/stable-diffusion-xl-base-1.0." in printed
    assert "Wrote image-node.png, 128x128, seed 14." in printed
    assert is_red_on_blue(open_image(tmp_path / "image-node.png"))


def test_curl_generates_an_image(server: LiveServer, tmp_path: Path) -> None:
    script = str(EXAMPLES / "curl.sh")
    prompt = "a red circle on a blue background"
    printed = run(server, tmp_path, script, prompt, SIZE="128x128", STEPS="8")
    assert f"Wrote image-curl.png from {server.url}/v1/images/files/" in printed
    assert is_red_on_blue(open_image(tmp_path / "image-curl.png"))


def test_curl_shows_the_error(server: LiveServer, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="Incorrect API key provided"):
        run(server, tmp_path, str(EXAMPLES / "curl.sh"), API_KEY="sk-wrong")


def test_previews_are_shown_while_the_image_is_generated(server: LiveServer, tmp_path: Path) -> None:
    printed = python(server, tmp_path, "stream_previews.py", *SMALL, "--columns", "16")
    assert [f"Preview {number}" in printed for number in (1, 2, 3, 4)] == [True, True, True, False]
    assert "Wrote image-streamed.png, 128x128." in printed
    assert printed.count("▀") == 4 * 16 * 8  # three previews and the image, two pixels per character
    open_image(tmp_path / "image-streamed.png")


def test_the_contact_sheet_has_the_image_of_every_seed(server: LiveServer, tmp_path: Path) -> None:
    prompt = "a red circle on a blue background"
    options = (prompt, *SMALL, "--columns", "2", "--seeds", "14", "3", "5")
    python(server, tmp_path, "contact_sheet.py", *options)
    python(
        server, tmp_path, "hyperbolic_client.py", prompt, "--width", "128", "--height", "128", "--steps", "8"
    )
    sheet = open_image(tmp_path / "sheet.png", size=(2 * 136 + 8, 2 * 152 + 8))
    alone = open_image(tmp_path / "image-hyperbolic.png")
    assert sheet.crop((8, 8, 136, 136)).tobytes() == alone.tobytes()
    assert sheet.getpixel((144 + 64, 160 + 64)) == (255, 255, 255)  # the fourth cell is empty


def test_an_edit_changes_only_the_masked_region(server: LiveServer, tmp_path: Path) -> None:
    python(server, tmp_path, "edit_with_mask.py", *SMALL)
    before, after = open_image(tmp_path / "before.png"), open_image(tmp_path / "after.png")
    assert before.tobytes() != after.tobytes()
    for edge in ((0, 0, 128, 16), (0, 112, 128, 128), (0, 0, 16, 128), (112, 0, 128, 128)):
        assert before.crop(edge).tobytes() == after.crop(edge).tobytes()


def test_the_hyperbolic_client_uses_loras(server: LiveServer, tmp_path: Path) -> None:
    options = ("--width", "128", "--height", "128", "--steps", "8")
    printed = python(server, tmp_path, "hyperbolic_client.py", *options)
    assert "seed 14" in printed
    assert "It costs 0.00005." in printed
    plain = open_image(tmp_path / "image-hyperbolic.png")
    python(server, tmp_path, "hyperbolic_client.py", *options, "--lora", "Pixel_Art=1", "--lora", "Logo=0.5")
    assert open_image(tmp_path / "image-hyperbolic.png").tobytes() != plain.tobytes()


def test_every_example_is_in_the_readme() -> None:
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    scripts = [file.name for file in EXAMPLES.iterdir() if file.suffix in (".py", ".mjs", ".sh")]
    assert len(scripts) >= 7
    assert [name for name in scripts if f"`{name}`" not in readme] == []
    assert shutil.which("curl")
