"""The playground's first view: the form, requests, their progress and their errors."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from hypergen.api.openapi import EXAMPLE_IMAGE
from tests.playground.actions import drop, finished, generate, png
from tests.playground.conftest import KEY, LIMITED_KEY, Faults, patch_models
from tests.support.live_server import LiveServer

if TYPE_CHECKING:
    from playwright.sync_api import FilePayload, Page

expect = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed").expect


def test_an_image_forms_with_progress_and_previews(open_page: Callable[..., Page]) -> None:
    page = open_page(settings={"num_inference_steps": "60", "seed": "9", "seedMode": "fixed"})
    generate(page)
    running = page.locator(".tile.running")
    expect(running.get_by_text(re.compile(r"Step \d+ of 60"))).to_be_visible()
    expect(running.locator("img")).to_be_visible()  # a preview
    expect(finished(page)).to_have_accessible_name("Open: a red circle on a blue background, seed 9")
    expect(running).to_have_count(0)


def test_the_form_shows_what_the_model_has_with_its_ranges_and_defaults(page: Page) -> None:
    steps = page.get_by_role("spinbutton", name="Steps")
    expect(steps).to_have_attribute("placeholder", "20")
    expect(steps).to_have_attribute("max", "150")
    expect(page.get_by_role("spinbutton", name="Guidance")).to_have_attribute("placeholder", "4")
    expect(page.get_by_label("Size")).to_contain_text("(model's own)")
    page.get_by_text("More settings").click()
    expect(page.get_by_role("spinbutton", name="Clip skip")).to_have_attribute("max", "12")
    for absent in ("second text encoder", "refiner", "True CFG", "ControlNet", "Schedule"):
        expect(page.get_by_text(absent)).to_have_count(0)
    page.get_by_label("Sampler").select_option("dpmpp_2m")
    expect(page.get_by_label("Schedule").locator("option")).to_have_count(7)


EVERY_OPTION = {
    "options": [
        "prompt_2",
        "negative_prompt",
        "clip_skip",
        "true_cfg_scale",
        "enable_refiner",
        "image",
        "mask",
        "loras",
        "control",
    ],
    "control_models": ["canny", "depth"],
}


def test_a_model_with_every_option_has_every_field(page: Page) -> None:
    patch_models(page, {"id": "small", "options": []}, {"id": "large", **EVERY_OPTION})
    page.get_by_label("Model").select_option("large")
    page.get_by_text("More settings").click()
    page.get_by_label("Prompt of the second text encoder", exact=True).fill("in oil")
    page.get_by_label("Negative prompt of the second text encoder").fill("text")
    page.get_by_role("spinbutton", name="True CFG scale").fill("2.5")
    page.get_by_label("Use the refiner").check()
    page.get_by_text("ControlNet", exact=True).first.click()
    data = base64.b64decode(EXAMPLE_IMAGE)
    file: FilePayload = {"name": "edges.png", "mimeType": "image/png", "buffer": data}
    page.locator("#f-control_image").set_input_files(file)
    expect(page.get_by_role("img", name="Control image")).to_be_visible()
    page.get_by_label("ControlNet", exact=True).select_option("depth")
    page.get_by_role("spinbutton", name="Strength of the ControlNet").fill("0.6")
    page.route("**/v1/images/generations", lambda route: route.fulfill(content_type="text/event-stream"))
    with page.expect_request("**/v1/images/generations") as sent:
        generate(page)
    fields = {
        "model": "large",
        "prompt_2": "in oil",
        "negative_prompt_2": "text",
        "true_cfg_scale": 2.5,
        "enable_refiner": True,
        "control_image": f"data:image/png;base64,{EXAMPLE_IMAGE}",
        "control_model": "depth",
        "controlnet_conditioning_scale": 0.6,
    }
    body = sent.value.post_data_json
    assert body is not None
    assert {name: body[name] for name in fields} == fields
    page.get_by_label("Model").select_option("small")
    expect(page.get_by_label("Negative prompt", exact=True)).to_have_count(0)
    expect(page.get_by_text("More settings")).to_have_count(0)


def test_the_embedded_model_says_what_it_can_generate(page: Page) -> None:
    expect(page.get_by_text("coloured shapes, and nothing else")).to_be_visible()
    examples = page.locator(".examples button")
    expect(examples).to_have_count(10)
    examples.nth(1).click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a yellow star on a black background")


def test_an_error_stands_at_its_field(page: Page, faults: Faults) -> None:
    faults.expected = "status of 400"
    generate(page, " ")
    expect(page.locator("[data-field=prompt]")).to_contain_text("enter a prompt")
    page.get_by_label("Size").select_option("custom")
    page.get_by_label("Width").fill("100")
    generate(page, "a green square")
    size = page.locator("[data-field=size]")
    expect(size.get_by_role("alert")).to_contain_text("divisible by 8")
    expect(page.get_by_label("Size")).to_be_focused()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a green square")
    page.get_by_label("Width").fill("104")
    expect(size.get_by_role("alert")).to_have_count(0)
    page.get_by_role("spinbutton", name="Images").fill("2.5")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator("[data-field=n]").get_by_role("alert")).to_contain_text("'n' should be")


def test_each_error_stands_at_the_field_that_it_names(page: Page, faults: Faults) -> None:
    faults.expected = "status of 400"
    patch_models(page, {"id": "large", **EVERY_OPTION}, {"id": "small"})
    expect(page.get_by_label("Model", exact=True)).to_have_value("large")
    page.get_by_label("Sampler").select_option("dpmpp_2m")
    page.get_by_role("tab", name="Edit").click()
    drop(page, "input.png", png())
    page.get_by_label("Prompt", exact=True).fill("a red circle")
    names = page.locator("[data-field]").evaluate_all(
        "(fields) => fields.map((field) => field.dataset.field)"
    )
    assert len(names) == 25
    params = {**{name: name for name in names}, "lora_path": "loras", "images": "image"}
    error: dict[str, str] = {}
    page.route("**/v1/images/edits", lambda route: route.fulfill(status=400, json={"error": error}))
    for param, field in params.items():
        error.update(message=f"'{param}' is wrong.", param=param)
        page.keyboard.press("Control+Enter")
        expect(page.locator(f"[data-field={field}]").get_by_role("alert")).to_have_text(error["message"])
        expect(page.get_by_role("alert")).to_have_count(1)
    late = {"message": "'loras' do not fit.", "param": "loras"}  # after the start of the stream
    event = f'event: error\ndata: {{"type":"error","error":{json.dumps(late)}}}\n\n'
    page.unroute("**/v1/images/edits")
    page.route(
        "**/v1/images/edits", lambda route: route.fulfill(body=event, content_type="text/event-stream")
    )
    page.keyboard.press("Control+Enter")
    expect(page.locator("[data-field=loras]").get_by_role("alert")).to_have_text(late["message"])


def test_requests_run_at_once_and_can_be_cancelled(
    open_page: Callable[..., Page], playground: LiveServer
) -> None:
    page = open_page(settings={"num_inference_steps": "150"})
    generate(page)
    generate(page, "a yellow star")
    running = page.locator(".tile.running")
    expect(running).to_have_count(2)
    expect(page.get_by_role("contentinfo", name="Server")).to_contain_text(
        re.compile("2 running|1 running.*1 waiting")
    )
    running.first.get_by_role("button", name="Cancel").click()
    expect(running).to_have_count(1)
    page.keyboard.press("Escape")
    expect(running).to_have_count(0)
    until = time.monotonic() + 30
    while playground.health()["queue_size"]:
        assert time.monotonic() < until, "the server was not told"
        time.sleep(0.05)


def test_more_requests_than_connections_finish(page: Page) -> None:
    for number in range(7):
        generate(page, f"a red circle {number}")
    expect(finished(page)).to_have_count(7)


def test_seeds_are_fixed_or_count_up(page: Page) -> None:
    page.get_by_role("textbox", name="Seed").fill("9007199254740993")  # beyond JavaScript's integers
    expect(page.get_by_role("radio", name="Fixed")).to_be_checked()
    page.get_by_text("+1").click()
    generate(page)
    expect(page.get_by_role("textbox", name="Seed")).to_have_value("9007199254740994")
    expect(finished(page)).to_have_accessible_name(re.compile("seed 9007199254740993$"))


def test_every_prompt_is_sent_as_it_is(page: Page) -> None:
    for seed in ("", "7"):
        page.get_by_role("textbox", name="Seed").fill(seed)
        with page.expect_request("**/v1/images/generations") as sent:
            generate(page, "SEED")
        body = sent.value.post_data_json
        assert body is not None
        assert (body["prompt"], body.get("seed")) == ("SEED", int(seed) if seed else None)
    expect(finished(page)).to_have_count(2)


def test_the_page_asks_for_the_key(open_page: Callable[..., Page], playground: LiveServer) -> None:
    page = open_page(key=None)
    dialog = page.get_by_role("dialog", name="API key")
    dialog.get_by_label("Key").fill("sk-wrong")
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_contain_text("did not accept")
    dialog.get_by_label("Key").fill(KEY)
    page.keyboard.press("Enter")
    expect(dialog).to_have_count(0)
    generate(page)
    expect(finished(page)).to_have_count(1)
    page.get_by_role("button", name="Key").click()
    expect(dialog).to_be_visible()
    expect(dialog.get_by_role("alert")).to_have_count(0)  # this key is accepted
    page.keyboard.press("Escape")
    assert KEY not in page.url
    assert KEY not in page.evaluate("JSON.stringify(localStorage)")


def test_a_key_that_is_withdrawn_loses_nothing(open_page: Callable[..., Page], faults: Faults) -> None:
    faults.expected = "status of 401"
    page = open_page()
    expect(page.get_by_role("contentinfo", name="Server")).to_contain_text("Ready")
    page.evaluate("sessionStorage.setItem('hypergen.key', 'sk-old')")
    generate(page)
    dialog = page.get_by_role("dialog", name="API key")
    dialog.get_by_label("Key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("needs an API key")
    page.get_by_role("button", name="Try again").click()
    expect(finished(page)).to_have_count(1)


def test_a_full_server_is_asked_again_after_its_wait(open_page: Callable[..., Page], faults: Faults) -> None:
    faults.expected = "status of 429"
    page = open_page(key=LIMITED_KEY, settings={"num_inference_steps": "40"})
    generate(page)
    expect(page.get_by_text(re.compile(r"Step \d+"))).to_be_visible()
    generate(page, "a yellow star")
    expect(page.get_by_text(re.compile(r"The server is full. Next try in \d+ s"))).to_be_visible()
    expect(finished(page)).to_have_count(2)


def test_a_server_that_cannot_be_reached_loses_nothing(page: Page, faults: Faults) -> None:
    faults.expected = "ERR_INTERNET_DISCONNECTED"
    expect(page.get_by_role("contentinfo", name="Server")).to_contain_text("Ready")
    page.context.set_offline(True)
    generate(page, "a green ring")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("cannot be reached")
    expect(page.get_by_role("contentinfo", name="Server")).to_contain_text("Cannot reach the server")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a green ring")
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    expect(finished(page)).to_have_count(1)


def test_a_lost_connection_can_be_tried_again(page: Page) -> None:
    event = (
        'event: image_generation.progress\ndata: {"type":"image_generation.progress","step":1,"steps":2}\n\n'
    )
    path = "**/v1/images/generations"
    page.route(path, lambda route: route.fulfill(body=event, content_type="text/event-stream"))
    generate(page)
    expect(page.get_by_role("alert")).to_contain_text("connection to the server was lost")
    page.unroute(path)
    page.get_by_role("button", name="Try again").click()
    expect(finished(page)).to_have_count(1)


def test_a_full_browser_still_shows_the_image(open_page: Callable[..., Page]) -> None:
    full = """
        for (const [kind, name] of [[IDBObjectStore, "put"], [Storage, "setItem"]])
            kind.prototype[name] = () => { throw new DOMException("full", "QuotaExceededError"); };
    """
    page = open_page(script=full, color_scheme="light")
    page.get_by_role("button", name="Change between light and dark").click()
    expect(page.locator("html")).to_have_css("color-scheme", "dark")
    generate(page)
    expect(page.get_by_text("no room for more images")).to_be_visible()
    expect(finished(page)).to_have_count(1)


def test_settings_survive_a_reload(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill("a pink heart")
    page.reload()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a pink heart")
