"""URLs of stored images, which need no key but cannot be guessed."""

from __future__ import annotations

import base64
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.http_client import GENERATIONS, QUICK, assert_error, client_of, generate
from tests.support.live_server import LiveServer


@pytest.fixture(scope="module")
def keyed(keyed_server: LiveServer) -> Iterator[httpx.Client]:
    with client_of(keyed_server) as client:
        yield client


@pytest.mark.parametrize(
    ("output_format", "extension", "media_type"),
    [("png", ".png", "image/png"), ("jpeg", ".jpg", "image/jpeg"), ("webp", ".webp", "image/webp")],
)
def test_a_stored_image_needs_no_key(
    keyed: httpx.Client, output_format: str, extension: str, media_type: str
) -> None:
    item = generate(keyed, output_format=output_format)["data"][0]
    assert item["url"].endswith(extension)
    response = httpx.get(item["url"])
    assert response.status_code == 200
    assert response.headers["content-type"] == media_type
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in response.headers["content-security-policy"]
    assert response.headers["x-request-id"]
    assert response.content == base64.b64decode(item["b64_json"])


def test_head_returns_the_size_of_a_stored_image(keyed: httpx.Client) -> None:
    url = generate(keyed)["data"][0]["url"]
    response = httpx.head(url)
    assert response.status_code == 200
    assert response.content == b""
    assert response.headers["content-type"] == "image/png"
    assert int(response.headers["content-length"]) == len(httpx.get(url).content)


def test_a_range_of_a_stored_image_can_be_requested(keyed: httpx.Client) -> None:
    url = generate(keyed)["data"][0]["url"]
    response = httpx.get(url, headers={"Range": "bytes=1-3"})
    assert (response.status_code, response.content) == (206, b"PNG")
    assert_error(httpx.get(url, headers={"Range": "bytes=99999999-"}), 416)
    assert_error(httpx.get(url, headers={"Range": "bytes=x"}), 400)


@pytest.mark.parametrize(
    "name",
    [
        "nothing.png",
        "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "..%2f..%2fservice.py",
        "%00.png",
        "a/b.png",
        "",
        "%ff.png",
    ],
)
def test_unknown_names_are_not_found(keyed: httpx.Client, name: str) -> None:
    assert_error(httpx.get(f"{keyed.base_url}/v1/images/files/{name}".replace("//v1", "/v1")), 404)


def test_every_stored_image_has_a_long_unique_name(keyed: httpx.Client) -> None:
    names = [item["url"].rpartition("/")[2] for item in generate(keyed, n=5, seed=1)["data"]]
    assert len(set(names)) == 5
    assert min(len(name.partition(".")[0]) for name in names) >= 32


def test_base64_still_works_without_disk_space(keyed: httpx.Client) -> None:
    name = generate(keyed)["data"][0]["url"].rpartition("/")[2]
    folder = next(file.parent for file in Path(tempfile.gettempdir()).glob(f"hypergen-images-*/{name}"))
    shutil.rmtree(folder)
    folder.write_bytes(b"in the way")
    try:
        response = keyed.post(GENERATIONS, json=QUICK)
        message = assert_error(response, 507, param="response_format", code="storage_full")
        assert "b64_json" in message
        assert str(folder) not in response.text
        assert response.headers["x-should-retry"] == "false"
        assert generate(keyed, response_format="b64_json")["data"]
        assert_error(keyed.get(f"/v1/images/files/{name}"), 404)
    finally:
        folder.unlink()
    assert httpx.get(generate(keyed)["data"][0]["url"]).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_stored_images_are_read_only(keyed: httpx.Client, method: str) -> None:
    url = generate(keyed)["data"][0]["url"]
    assert_error(httpx.request(method, url), 401)
    assert_error(keyed.request(method, url), 405)
    assert httpx.get(url).status_code == 200
