"""The playground's edits: the input image, the mask, the result."""

from __future__ import annotations

import base64
import re
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from tests.playground.actions import PROMPT, download, drop, finished, generate, generate_file, png
from tests.support.live_server import LiveServer

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

expect = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed").expect


def test_an_edit_changes_what_is_painted_only(page: Page, playground: LiveServer) -> None:
    data = generate_file(playground, size="256x256", num_inference_steps=4)
    page.get_by_role("tab", name="Edit").click()
    expect(page.get_by_role("button", name="Generate edit")).to_be_disabled()
    drop(page, "input.png", data)
    canvas = page.get_by_role("application")
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.5 * box["height"], steps=4)
    page.mouse.up()
    generate(page, "a yellow star on a black background")
    result = page.locator(".result").get_by_role("button", name="Open: a yellow star")
    result.click()
    viewer = page.get_by_role("dialog", name="Image")
    viewer.get_by_label("Compare with").select_option("source")
    expect(viewer.locator(".over")).to_be_visible()
    before = np.asarray(Image.open(BytesIO(data)).convert("RGB")).astype(int)
    after = np.asarray(Image.open(BytesIO(download(page, "Download"))).convert("RGB")).astype(int)
    changed = abs(after - before).max(axis=2) > 8
    assert changed[112:144, 96:160].mean() > 0.5
    assert not changed[:64].any()
    assert not changed[192:].any()


def paste(page: Page, data: bytes) -> None:
    """Put an image into the clipboard, and paste it with the keyboard."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(
        """async (data) => {
            const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
            const image = new Blob([bytes], { type: "image/png" });
            await navigator.clipboard.write([new ClipboardItem({ "image/png": image })]);
        }""",
        base64.b64encode(data).decode(),
    )
    page.keyboard.press("Control+v")


def test_a_pasted_image_is_edited(page: Page, playground: LiveServer) -> None:
    page.get_by_role("tab", name="Edit").click()
    paste(page, generate_file(playground))
    expect(page.get_by_role("img", name="Input image")).to_be_visible()
    assert page.get_by_role("img", name="Input image").evaluate("(image) => image.naturalWidth") == 128
    generate(page)
    expect(page.locator(".result").get_by_role("button", name=f"Open: {PROMPT}")).to_be_visible()
    page.get_by_role("tab", name="Generate").click()
    expect(finished(page)).to_have_count(1)


def painted(canvas: Locator) -> float:
    """The painted share of the mask."""
    return canvas.evaluate(
        """(canvas) => {
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return data.filter((value, index) => index % 4 === 3 && value > 127).length / data.length * 4;
        }"""
    )


def test_the_mask_is_painted_with_the_keyboard(page: Page) -> None:
    page.get_by_role("tab", name="Edit").click()
    drop(page, "input.png", png())
    canvas = page.get_by_role("application")
    canvas.focus()
    brush = page.locator(".brush")
    expect(brush).to_have_css("width", re.compile(r"\d"))
    assert painted(canvas) == 0
    page.keyboard.press(" ")
    one = painted(canvas)
    assert 0.01 < one < 0.3
    before = brush.bounding_box()
    for key in ("ArrowRight", "ArrowRight", " "):
        page.keyboard.press(key)
    after = brush.bounding_box()
    assert before is not None
    assert after is not None
    assert after["x"] > before["x"] + 0.9 * before["width"]
    two = painted(canvas)
    assert two > 1.5 * one
    page.keyboard.press("i")
    assert painted(canvas) == pytest.approx(1 - two, abs=0.02)
    page.keyboard.press("Control+z")
    assert painted(canvas) == pytest.approx(two)
    page.keyboard.press("e")
    page.keyboard.press(" ")
    less = painted(canvas)
    assert less < two
    page.get_by_role("tab", name="Generate").click()
    page.get_by_role("tab", name="Edit").click()
    expect(canvas).to_be_visible()
    assert painted(canvas) == pytest.approx(less)
