"""One server with two models and keys, and pages in Debian's Chromium, which must have no faults."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.live_server import LiveServer, start_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Route

KEY = "sk-page"
LIMITED_KEY = "sk-limited"  # one request at once
EMBEDDED_MODEL = "hypergen-tiny"
SMALL_MODEL = "small-sd"  # random weights
# Few steps, because the tests look at the page and not at the images.
QUICK_SETTINGS = {"num_inference_steps": "2"}
TIMEOUT_MS = 60_000


@pytest.fixture(scope="session")
def playground(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Iterator[LiveServer]:
    """A server of the embedded model and of `SMALL_MODEL`, with two keys."""
    folder = tmp_path_factory.mktemp("playground")
    small = folder / "small.yaml"
    small.write_text(f"source: {sd_folder}\nname: {SMALL_MODEL}\ndefaults: {{width: 64, height: 64}}\n")
    keys = folder / "keys"
    keys.write_text(f"limited: {LIMITED_KEY} requests=1\n", encoding="utf-8")
    environment = {"HYPERGEN_API_KEY_FILE": str(keys), "HYPERGEN_DEVICE": "cpu"}
    models = (EMBEDDED_MODEL, str(small))
    with start_server(folder / "server", *models, environment=environment, api_key=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium. For one module: Playwright's event loop would disturb those of other tests."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed; Debian's package chromium has it")
    playwright.expect.set_options(timeout=TIMEOUT_MS)
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Faults:
    """What must not happen on a page.

    Attributes:
        expected: regular expression of console errors that a test causes.
    """

    own: str
    expected: str | None = None
    seen: list[str] = field(default_factory=list[str])

    def watch(self, page: Page) -> None:
        page.on("console", self._check_message)
        page.on("pageerror", lambda error: self.seen.append(str(error)))
        page.on("request", lambda request: self._check_host(request.url))

    def _check_message(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.seen.append(message.text)

    def _check_host(self, url: str) -> None:
        if not url.startswith((self.own, "data:", "blob:")):
            self.seen.append(f"A request to another host: {url}")

    def was_interrupted(self) -> bool:
        """Whether Chromium dropped connections because a network interface of the machine came or went."""
        interruptions = [fault for fault in self.seen if "ERR_NETWORK_CHANGED" in fault]
        self.seen = [fault for fault in self.seen if fault not in interruptions]
        return bool(interruptions)

    def unexpected(self) -> list[str]:
        return [fault for fault in self.seen if not (self.expected and re.search(self.expected, fault))]


@pytest.fixture
def faults(playground: LiveServer) -> Faults:
    return Faults(playground.url)


@pytest.fixture
def open_page(playground: LiveServer, browser: Browser, faults: Faults) -> Iterator[Callable[..., Page]]:
    """Opens the playground in a browser profile of its own; fails if the page has faults at the end."""
    contexts = []

    def open_one(
        key: str | None = KEY, settings: dict[str, Any] = QUICK_SETTINGS, script: str = "", **options: Any
    ) -> Page:
        context = browser.new_context(base_url=playground.url, **options)
        contexts.append(context)
        context.set_default_timeout(TIMEOUT_MS)
        # Once, and not at each reload.
        context.add_init_script(
            f"""if (!sessionStorage.getItem("test")) {{
                sessionStorage.setItem("test", "1");
                localStorage.setItem("hypergen.settings", {json.dumps(json.dumps(settings))});
                if ({json.dumps(key)}) sessionStorage.setItem("hypergen.key", {json.dumps(key)});
            }} {script}"""
        )
        page = context.new_page()
        faults.watch(page)
        page.goto("/")
        while faults.was_interrupted():
            page.reload()
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not faults.unexpected()


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    """The page on a desktop, with the key."""
    return open_page(viewport={"width": 1280, "height": 800})


def patch_models(page: Page, *changes: dict[str, Any]) -> None:
    """Let the page see the served model several times, each with some changes; it answers to every name."""

    def fulfill(route: Route) -> None:
        health = route.fetch().json()
        route.fulfill(json={**health, "models": [{**health["models"][0], **change} for change in changes]})

    page.route("**/health", fulfill)


AXE = Path(__file__).parent / "axe.min.js"
