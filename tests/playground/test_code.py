"""The playground's "Code": each program generates the request of the form."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from tests.playground.actions import drop, generate_file
from tests.playground.conftest import KEY
from tests.support.live_server import LiveServer
from tests.support.packages import node_packages

if TYPE_CHECKING:
    from playwright.sync_api import Page

expect = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed").expect


def test_the_code_generates_the_same_request(page: Page, playground: LiveServer, tmp_path: Path) -> None:
    page.get_by_label("Prompt", exact=True).fill('it\'s "a red circle"\non blue')
    page.get_by_role("textbox", name="Seed").fill("7")
    page.get_by_label("LoRAs").select_option("Pixel_Art")
    expect(page.get_by_role("slider", name="Weight of Pixel_Art")).to_have_value("1")
    page.get_by_role("button", name="Code").click()
    dialog = page.get_by_role("dialog")
    environment = {**os.environ, "HYPERGEN_API_KEY": KEY}
    code = dialog.locator("pre")
    expect(code).to_contain_text("curl http://127.0.0.1")
    assert KEY not in code.inner_text()
    curl = ["bash", "-c", code.inner_text().replace("curl ", "curl --fail --silent ", 1)]
    answer = subprocess.run(curl, env=environment, capture_output=True, text=True, check=True).stdout
    assert '"seed":7' in answer
    dialog.get_by_text("Python").click()
    expect(code).to_contain_text("client.images.generate(")
    program = [sys.executable, "-c", code.inner_text()]
    subprocess.run(program, env=environment, cwd=tmp_path, check=True)
    assert (tmp_path / "image-0.png").read_bytes()[:4] == b"\x89PNG"
    dialog.get_by_text("Node").click()
    expect(code).to_contain_text("await client.images.generate({")
    dialog.get_by_text("Hyperbolic").click()
    expect(code).to_contain_text('"steps": 2')
    curl = ["bash", "-c", code.inner_text().replace("curl ", "curl --fail --silent ", 1)]
    again = subprocess.run(curl, env=environment, capture_output=True, text=True, check=True).stdout
    assert re.search(r'"b64_json":"([^"]+)', answer)[1] == re.search(r'"image":"([^"]+)', again)[1]  # type: ignore[index]


def test_the_code_of_an_edit_generates_the_same_image(
    page: Page, playground: LiveServer, tmp_path: Path
) -> None:
    packages = Path(__file__).parents[1] / "clients" / "node"
    node = node_packages(packages)
    (tmp_path / "node_modules").symlink_to(packages / "node_modules")
    data = generate_file(playground, size="256x256", num_inference_steps=1)
    (tmp_path / "input.png").write_bytes(data)
    Image.radial_gradient("L").convert("RGBA").save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as mask:
        mask.putalpha(Image.radial_gradient("L"))
        mask.save(tmp_path / "mask.png")

    page.get_by_role("tab", name="Edit").click()
    drop(page, "input.png", data)
    page.get_by_role("application").press(" ")
    page.get_by_label("Prompt", exact=True).fill('@true;type=a "red" circle\'s\nlast line')
    page.get_by_role("textbox", name="Seed").fill("7")
    page.get_by_role("spinbutton", name="Strength").fill("0.9")
    page.get_by_label("LoRAs").select_option("Pixel_Art")
    page.get_by_role("button", name="Code").click()
    dialog = page.get_by_role("dialog")
    environment = {**os.environ, "HYPERGEN_API_KEY": KEY}

    def run(language: str, *command: str) -> str:
        dialog.get_by_text(language, exact=True).click()
        code = dialog.locator("pre").inner_text()
        assert "image" in code
        assert "mask" in code
        done = subprocess.run(
            command, input=code, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    answer = json.loads(run("curl", "bash"))
    image = base64.b64decode(answer["data"][0]["b64_json"])
    assert Image.open(BytesIO(image)).size == (256, 256)
    for language, command in (
        ("Python", [sys.executable, "-"]),
        ("Node", [node, "--input-type=module", "-"]),
    ):
        run(language, *command)
        result = tmp_path / "image-0.png"
        assert result.read_bytes() == image, language
        result.unlink()
    dialog.get_by_text("Hyperbolic", exact=True).click()
    expect(dialog.locator("pre")).to_contain_text("has no mask")
