"""Makes the images of docs/playground.md and the README: the playground in Debian's Chromium.

`python -m scripts.make_playground_screenshots`; takes a minute.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import click
from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

from tests.support.live_server import start_server

FOLDER = Path(__file__).parents[1] / "docs" / "playground"
DESKTOP: ViewportSize = {"width": 1280, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 844}
PROMPTS = (
    "three yellow stars on a black background",
    "a white ring on a purple background",
    "a pink heart on a gray background",
    "a green square to the left of a white heart on a purple background",
    "a black diamond on a yellow background",
    "an orange moon on a blue background",
    "a cyan square on a yellow background",
    "a red circle on a blue background",
)
TIMEOUT_MS = 120_000


@contextmanager
def open_page(browser: Browser, url: str) -> Iterator[Page]:
    context = browser.new_context(color_scheme="light", viewport=DESKTOP, device_scale_factor=1.5)
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    page.goto(url)
    yield page
    context.close()


def generate(page: Page, prompt: str, seed: int) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("textbox", name="Seed").fill(str(seed))
    page.keyboard.press("Control+Enter")


def wait(page: Page, images: int) -> None:
    page.get_by_role("button", name="Open:").nth(images - 1).wait_for()


def save(page: Page, name: str) -> None:
    """Desktop and phone, as WebP."""
    page.mouse.move(0, 0)
    for suffix, size in (("", DESKTOP), ("-phone", PHONE)):
        page.set_viewport_size(size)
        if suffix:  # the images are below the form
            page.evaluate("document.getElementById('images').scrollIntoView()")
        Image.open(BytesIO(page.screenshot())).save(FOLDER / f"{name}{suffix}.webp", quality=88, method=6)
    page.set_viewport_size(DESKTOP)


def make(page: Page) -> None:
    for seed, prompt in enumerate(PROMPTS, 3):
        generate(page, prompt, seed)
    wait(page, len(PROMPTS))
    steps = page.get_by_role("spinbutton", name="Steps")
    steps.fill("60")  # time for the screenshots
    generate(page, "a yellow star on a black background", 5)
    generate(page, "two white hearts on a green background", 9)
    page.locator(".tile.running img").first.wait_for()
    save(page, "generate")
    wait(page, len(PROMPTS) + 2)
    steps.fill("")
    make_edit(page)
    make_grid(page)


def make_edit(page: Page) -> None:
    """One of two shapes becomes another one; the other is kept."""
    page.get_by_role("button", name="Open: a green square").click()
    page.get_by_role("button", name="Use as input").click()
    box = page.get_by_role("application").bounding_box()
    assert box is not None
    left, right = (box["x"] + share * box["width"] for share in (0.14, 0.36))
    page.mouse.move(left, box["y"] + 0.38 * box["height"])
    page.mouse.down()
    for row, share in enumerate((0.38, 0.5, 0.62)):
        y = box["y"] + share * box["height"]
        for x in (left, right) if row % 2 == 0 else (right, left):
            page.mouse.move(x, y, steps=8)
    page.mouse.up()
    generate(page, "a yellow star to the left of a white heart on a purple background", 4)
    page.locator(".result").get_by_role("button", name="Open: a yellow star").wait_for()
    page.get_by_text("0 running").wait_for()
    save(page, "edit")


def make_grid(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill("a yellow star on a black background")
    page.get_by_role("tab", name="Grid").click()
    page.get_by_label("Columns", exact=True).select_option("words")
    page.get_by_label("Columns: Values").fill("star, heart, moon, cross")
    page.get_by_label("Rows", exact=True).select_option("num_inference_steps")
    page.get_by_label("Rows: Values").fill("2, 6, 20")
    page.get_by_role("button", name="Generate 12 cells").click()
    page.get_by_role("table").get_by_role("button").nth(11).wait_for()
    page.get_by_text("0 running").wait_for()
    save(page, "grid")


@click.command()
def main() -> None:
    """Start a server and make the images in docs/playground."""
    FOLDER.mkdir(exist_ok=True)
    program = shutil.which("chromium")
    with (
        tempfile.TemporaryDirectory() as folder,
        start_server(Path(folder) / "server") as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        with open_page(browser, server.url) as page:
            make(page)
        browser.close()


if __name__ == "__main__":
    main()
