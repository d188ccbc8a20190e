"""The playground's gallery, large view and grid, and what everybody needs of the page."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any

import pytest
from PIL import ExifTags, Image

from tests.playground.actions import (
    PROMPT,
    download,
    drop,
    finished,
    generate,
    generate_file,
    pinch_out,
    png,
    with_exif,
)
from tests.playground.conftest import AXE, EMBEDDED_MODEL, SMALL_MODEL, Faults
from tests.support.live_server import LiveServer

if TYPE_CHECKING:
    from playwright.sync_api import FilePayload, Page

expect = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed").expect
A1111 = (
    "a red circle <lora:Pixel_Art:0.8>\nNegative prompt: blue\n"
    "Steps: 7, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 3.5, Seed: 42, Size: 128x96, Clip skip: 2"
)
COMFY_UI = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x.safetensors"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red circle", "clip": ["1", 1]}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "blue", "clip": ["1", 1]}},
    "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 96, "batch_size": 1}},
    "5": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 42,
            "steps": 7,
            "cfg": 3.5,
            "sampler_name": "dpmpp_2m",
            "scheduler": "karras",
            "denoise": 1,
            "model": ["1", 0],
            "positive": ["2", 0],
            "negative": ["3", 0],
            "latent_image": ["4", 0],
        },
    },
}


def test_the_gallery_keeps_images_and_a_zip_has_them_all(page: Page) -> None:
    generate(page)
    generate(page, "a yellow star")
    expect(finished(page)).to_have_count(2)
    page.reload()
    expect(finished(page)).to_have_count(2)
    with zipfile.ZipFile(BytesIO(download(page, "Download all"))) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert [name[:6] for name in sorted(names)] == ["0001-a", "0002-a"]
        assert all(Image.open(BytesIO(archive.read(name))).size == (256, 256) for name in names)
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete all").click()
    expect(page.get_by_text("No images yet")).to_be_visible()
    page.reload()
    expect(page.get_by_text("No images yet")).to_be_visible()


def test_the_large_view_zooms_compares_and_gives_its_settings_back(page: Page) -> None:
    page.get_by_role("textbox", name="Seed").fill("7")
    generate(page)
    expect(finished(page)).to_have_count(1)
    generate(page, "a yellow star")
    expect(finished(page)).to_have_count(2)
    finished(page).first.click()
    viewer = page.get_by_role("dialog", name="Image")
    expect(viewer.get_by_text("a yellow star")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(viewer.locator(".prompt")).to_have_text(PROMPT)
    page.keyboard.press("+")
    expect(viewer.get_by_role("button", name="150 %")).to_be_visible()
    page.keyboard.press("ArrowDown")  # of a zoomed image another part
    expect(viewer.locator(".zoomed")).to_have_attribute(
        "style", re.compile(r"scale\(1.5\) translate\(0px, -40px\)")
    )
    page.keyboard.press("0")
    expect(viewer.get_by_role("button", name="Fit")).to_be_visible()
    pinch_out(page, viewer.locator(".stage"))
    expect(viewer.get_by_role("button", name=re.compile(r"1\d\d %"))).to_be_visible()
    viewer.get_by_label("Compare with").select_option(index=1)
    divider = viewer.get_by_role("slider", name="Divider")
    divider.fill("30")
    expect(viewer.locator(".over")).to_have_css("clip-path", "inset(0px 70% 0px 0px)")
    viewer.get_by_role("button", name="Use these settings").click()
    expect(viewer).to_have_count(0)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(PROMPT)
    expect(page.get_by_role("textbox", name="Seed")).to_have_value("7")
    finished(page).first.click()
    page.get_by_label("Same seed, other").select_option(label="Guidance")
    expect(page.get_by_label("Columns: Values")).to_have_value("1, 2, 4, 7, 12")


@pytest.mark.parametrize("program", ["png", "jpeg", "webp", "a1111", "a1111 jpeg", "comfyui", "comfyui webp"])
def test_settings_of_a_dropped_file_are_read(page: Page, playground: LiveServer, program: str) -> None:
    expect(page.get_by_role("contentinfo", name="Server")).to_contain_text("Ready")
    own = {"guidance_scale": 3.5, "negative_prompt": "blue", "sampler": "dpmpp_2m", "scheduler": "karras"}
    if program == "a1111":
        data = png(parameters=A1111)
    elif program == "a1111 jpeg":
        data = with_exif("JPEG", ExifTags.Base.UserComment, b"UNICODE\0" + A1111.encode("utf-16-be"))
    elif program == "comfyui":
        data = png(prompt=json.dumps(COMFY_UI))
    elif program == "comfyui webp":
        data = with_exif("WEBP", ExifTags.Base.Model, "prompt:" + json.dumps(COMFY_UI))
    else:
        data = generate_file(playground, output_format=program, **own)
    file_format = program.split(" ")[-1]
    name = f"file.{file_format if file_format in ('jpeg', 'webp') else 'png'}"
    if file_format == "jpeg":
        file: FilePayload = {"name": name, "mimeType": "image/jpeg", "buffer": data}
        page.get_by_label("Settings of a file").set_input_files(file)
    else:
        drop(page, name, data)
    expect(page.get_by_text(re.compile("Settings of file"))).to_be_visible()
    values = {
        "Prompt": "a red circle",
        "Negative prompt": "blue",
        "Sampler": "dpmpp_2m",
        "Schedule": "karras",
    }
    for label, value in values.items():
        expect(page.get_by_label(label, exact=True)).to_have_value(value)
    for name, value in {"Steps": "7", "Guidance": "3.5"}.items():
        expect(page.get_by_role("spinbutton", name=name)).to_have_value(value)
    expect(page.get_by_role("textbox", name="Seed")).to_have_value("42")
    expect(page.get_by_label("Width")).to_have_value("128")
    if program.startswith("a1111"):
        expect(page.get_by_role("slider", name="Weight of Pixel_Art")).to_have_value("0.8")


def test_a_seed_of_a_file_is_a_number(page: Page) -> None:
    drop(page, "file.png", png(parameters="a red circle\nSteps: 7, Seed: exit(1), Size: 128x96"))
    expect(page.get_by_role("spinbutton", name="Steps")).to_have_value("7")
    expect(page.get_by_role("radio", name="Random")).to_be_checked()


def test_a_file_without_settings_can_be_the_input_image(page: Page) -> None:
    drop(page, "plain.png", png())
    page.get_by_role("button", name="Use as input").click()
    expect(page.get_by_role("button", name="Generate edit")).to_be_enabled()
    for name in ("broken.png", "notes.txt"):
        drop(page, name, b"nothing")
        expect(page.get_by_text(f"{name} is not an image")).to_be_visible()


def test_a_grid_fills_its_cells_and_is_saved_as_one_image(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("tab", name="Grid").click()
    page.get_by_label("Columns", exact=True).select_option("words")
    page.get_by_label("Columns: Values").fill("green, pink")
    page.get_by_label("Rows", exact=True).select_option("guidance_scale")
    page.get_by_label("Rows: Values").fill("1, 4")
    page.get_by_role("button", name="Generate 4 cells").click()
    expect(page.get_by_role("alert")).to_contain_text("does not contain “green”")
    page.get_by_label("Columns: Values").fill("red, green")
    page.get_by_role("button", name="Generate 4 cells").click()
    expect(page.get_by_role("columnheader", name="green")).to_be_visible()
    expect(page.get_by_role("rowheader", name="Guidance 4")).to_be_visible()
    cells = page.get_by_role("table").get_by_role("button")
    expect(cells).to_have_count(4)
    names = [cells.nth(index).get_attribute("aria-label") or "" for index in range(4)]
    assert ["green" in name for name in names] == [False, True, False, True]
    assert len({name.rpartition(" ")[2] for name in names}) == 1  # the same seed
    width, height = Image.open(BytesIO(download(page, "Save as one image"))).size
    assert width > 2 * 256
    assert height > 2 * 256
    assert width < 3 * 256


def test_a_grid_compares_models(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("tab", name="Grid").click()
    page.get_by_label("Columns", exact=True).select_option(label="Model")
    expect(page.get_by_label("Columns: Values")).to_have_value(f"{EMBEDDED_MODEL}, {SMALL_MODEL}")
    page.get_by_role("button", name="Generate 2 cells").click()
    cells = page.get_by_role("table").get_by_role("button")
    expect(cells).to_have_count(2)
    viewer = page.get_by_role("dialog", name="Image")
    for index, (model, size) in enumerate(((EMBEDDED_MODEL, (256, 256)), (SMALL_MODEL, (64, 64)))):
        expect(page.get_by_role("columnheader").nth(index)).to_have_text(model)
        cells.nth(index).click()
        expect(viewer.get_by_text(model, exact=True)).to_be_visible()
        assert Image.open(BytesIO(download(page, "Download"))).size == size
        page.keyboard.press("Escape")


def test_a_grid_compares_lora_weights_and_keeps_its_axes(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("tab", name="Grid").click()
    page.get_by_label("Columns", exact=True).select_option("none")
    page.get_by_label("Rows", exact=True).select_option(label="LoRA weight")
    page.get_by_label("Rows: Values").fill("Pixel_Art 0, 1")
    sent: list[float] = []

    def note(body: Any) -> None:
        sent.append(body["loras"]["Pixel_Art"])

    page.on("request", lambda request: note(request.post_data_json) if request.post_data else None)
    page.get_by_role("button", name="Generate 2 cells").click()
    expect(page.get_by_role("rowheader", name="Pixel_Art 1")).to_be_visible()
    expect(page.get_by_role("table").get_by_role("button")).to_have_count(2)
    assert sorted(sent) == [0, 1]
    page.get_by_role("tab", name="Generate").click()
    page.get_by_role("tab", name="Grid").click()
    expect(page.get_by_label("Rows: Values")).to_have_value("Pixel_Art 0, 1")
    page.reload()
    page.get_by_role("tab", name="Grid").click()
    expect(page.get_by_label("Rows: Values")).to_have_value("Pixel_Art 0, 1")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible_and_fits_a_phone(open_page: Callable[..., Page], scheme: str) -> None:
    page = open_page(color_scheme=scheme, viewport={"width": 360, "height": 740}, has_touch=True)
    generate(page)
    expect(finished(page)).to_have_count(1)
    page.evaluate(AXE.read_text(encoding="utf-8"))
    check(page)
    generate(page, " ")
    expect(page.get_by_role("alert")).to_be_visible()
    check(page)
    page.get_by_role("button", name="Code").click()
    check(page)
    page.keyboard.press("Escape")
    finished(page).click()
    expect(page.get_by_role("dialog")).to_be_visible()
    check(page)
    page.get_by_role("button", name="Use as input").click()
    expect(page.get_by_role("application")).to_be_visible()
    check(page)
    page.get_by_role("tab", name="Grid").click()
    check(page)


def check(page: Page) -> None:
    found = page.evaluate("axe.run().then((result) => result.violations)")
    faults = [(each["id"], [node["html"] for node in each["nodes"]]) for each in found]
    assert faults == []
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_the_description_of_the_api_opens_without_a_key(
    open_page: Callable[..., Page], faults: Faults
) -> None:
    page = open_page(key=None)
    faults.expected = "status of 401"
    page.goto("/docs")
    page.get_by_text("List the served models").click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    expect(page.get_by_text("Incorrect API key provided").first).to_be_visible()
    expect(page.get_by_role("button", name="Authorize")).to_be_visible()
