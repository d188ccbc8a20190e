"""What a person does on the page, and what files they have."""

from __future__ import annotations

import base64
import mimetypes
from io import BytesIO
from typing import TYPE_CHECKING, Any

import httpx
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from tests.playground.conftest import KEY
from tests.support.live_server import LiveServer

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

PROMPT = "a red circle on a blue background"


def finished(page: Page) -> Locator:
    return page.get_by_role("button", name="Open:")


def generate(page: Page, prompt: str = PROMPT) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.keyboard.press("Control+Enter")


def pinch_out(page: Page, locator: Locator) -> None:
    """Two fingers on the middle of an element that move apart."""
    box = locator.bounding_box()
    assert box is not None
    session = page.context.new_cdp_session(page)
    kinds = ["touchStart", *["touchMove"] * 10]
    middle, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for index, kind in enumerate(kinds):
        fingers = [{"x": middle + side * (40 + 5 * index), "y": y, "id": side + 1} for side in (-1, 1)]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def download(page: Page, button: str) -> bytes:
    with page.expect_download() as started:
        page.get_by_role("button", name=button).click()
    return started.value.path().read_bytes()


def drop(page: Page, name: str, data: bytes) -> None:
    """Drop a file onto the page, as a file manager does."""
    page.evaluate(
        """([name, type, data]) => {
            const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], name, { type }));
            const event = new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true });
            document.body.dispatchEvent(event);
            if (!event.defaultPrevented) throw new Error("The browser shows the file instead of the page.");
        }""",
        [name, mimetypes.guess_type(name)[0], base64.b64encode(data).decode()],
    )


def generate_file(playground: LiveServer, **fields: Any) -> bytes:
    body = {"prompt": "a red circle", "size": "128x96", "num_inference_steps": 7, "seed": 42, **fields}
    headers = {"Authorization": f"Bearer {KEY}"}
    response = httpx.post(f"{playground.url}/v1/images/generations", json=body, headers=headers, timeout=60)
    return base64.b64decode(response.json()["data"][0]["b64_json"])


def with_exif(file_format: str, tag: int, value: str | bytes) -> bytes:
    """An image with one EXIF tag: of the camera's table if the value is bytes, else of the main one."""
    exif = Image.Exif()
    if isinstance(value, bytes):
        exif[ExifTags.IFD.Exif] = {tag: value}
    else:
        exif[tag] = value
    file = BytesIO()
    Image.new("RGB", (64, 64)).save(file, file_format, exif=exif)
    return file.getvalue()


def png(**texts: str) -> bytes:
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text, zip=True)
    file = BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG", pnginfo=info)
    return file.getvalue()
