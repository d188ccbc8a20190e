"""The web pages: the playground at / and Swagger UI at /docs, as files."""

from __future__ import annotations

import re

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from starlette.testclient import TestClient

from hypergen.api.web_pages import add_web_pages
from tests.support.http_client import assert_error
from tests.support.live_server import LiveServer

LINKED = re.compile(r'(?:src|href)="((?:playground|docs)/[^"]+)"')


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_and_its_files_are_served_with_strict_headers(client: httpx.Client, path: str) -> None:
    page = client.get(path)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    files = LINKED.findall(page.text)
    assert files
    types = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8", "svg": "image/svg+xml"}
    for name in files:
        response = client.get("/" + name)
        assert response.headers["content-type"] == types[name.rpartition(".")[2]]
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
    assert "://" not in page.text


def test_an_unchanged_file_is_not_sent_again(client: httpx.Client) -> None:
    first = client.get("/playground/main.js")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/playground/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    changed = client.get("/playground/main.js", headers={"If-None-Match": '"another"'})
    assert changed.content == first.content
    head = client.head("/playground/main.js")
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(first.content)))


@pytest.mark.parametrize(
    "path",
    ["/playground/x.js", "/playground/../api/auth.py", "/playground/%2e%2e/config.py", "/docs/index.md"],
)
def test_no_other_file_is_served(client: httpx.Client, path: str) -> None:
    assert_error(client.get(path), 404)


def test_other_sites_may_link_to_the_pages_but_not_use_the_api(client: httpx.Client) -> None:
    headers = {"Sec-Fetch-Site": "cross-site"}
    assert client.get("/", headers=headers).status_code == 200
    assert_error(client.get("/v1/models", headers=headers), 403, code="cross_site")


def test_pages_need_no_key_but_other_methods_do(keyed_server: LiveServer) -> None:
    for path in ("/", "/docs", "/openapi.json", "/playground/main.js", "/docs/start.js"):
        assert httpx.get(keyed_server.url + path).status_code == 200
        assert_error(httpx.post(keyed_server.url + path), 401)


def test_without_the_playground_its_paths_do_not_exist() -> None:
    router = APIRouter()
    add_web_pages(router, playground=False)
    app = FastAPI(docs_url=None)
    app.include_router(router)
    with TestClient(app) as client:
        assert client.get("/").status_code == 404
        assert client.get("/playground/main.js").status_code == 404
        assert client.get("/docs").status_code == 200
