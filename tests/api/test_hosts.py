"""Allowed hosts and origins of a server, and the hosts in `url` results."""

from __future__ import annotations

import httpx
import pytest

from tests.api.conftest import TightServer
from tests.support.http_client import GENERATIONS, QUICK, assert_error, client_of, generate
from tests.support.image_files import as_file, gradient
from tests.support.live_server import LiveServer

LOCAL_HOSTS = [
    "127.0.0.1",
    "localhost:8000",
    "LOCALHOST",
    "[::1]:8000",
    "a.localhost",
    "localhost.",
]
OTHER_HOSTS = [
    "evil.example",
    "evil.example:8000",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "evil",
]
MALFORMED_HOSTS = [
    "x/health?",
    "a b",
    "user@host",
    "host:99999999",
    "h\\x",
    "[::1",
    "é.example",
    "",
    "[evil]",
]


@pytest.mark.parametrize("host", LOCAL_HOSTS)
def test_without_a_key_local_hosts_are_allowed(client: httpx.Client, host: str) -> None:
    assert client.get("/v1/models", headers={"Host": host}).status_code == 200
    url = client.post(GENERATIONS, json=QUICK, headers={"Host": host}).json()["data"][0]["url"]
    assert url.startswith(f"http://{host}/v1/images/files/")


OTHER_ADDRESSES = ["192.168.1.5:8000", "203.0.113.66", "[2001:db8::1]:8000"]


@pytest.mark.parametrize("host", OTHER_ADDRESSES)
def test_other_ip_addresses_are_allowed_but_not_used_in_urls(
    client: httpx.Client, keyed_server: LiveServer, host: str
) -> None:
    headers = {"Host": host}
    with client_of(keyed_server) as keyed:
        for http_client in (client, keyed):
            (item,) = http_client.post(GENERATIONS, json=QUICK, headers=headers).json()["data"]
            assert item["b64_json"]
            assert "url" not in item
            response = http_client.post(
                GENERATIONS, json={**QUICK, "response_format": "url"}, headers=headers
            )
            assert_error(response, 400, param="response_format", code="invalid_host")


@pytest.mark.parametrize("host", [*OTHER_HOSTS, *MALFORMED_HOSTS])
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics", "/docs", "/v1/images/files/x.png"])
def test_without_a_key_other_hosts_are_rejected(client: httpx.Client, path: str, host: str) -> None:
    response = client.get(path, headers=[(b"Host", host.encode())])
    assert_error(response, 403, code="forbidden_host")
    assert response.json()["error"]["type"] == "permission_error"


@pytest.mark.parametrize("site", ["cross-site"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_without_a_key_cross_site_requests_are_rejected(client: httpx.Client, method: str, site: str) -> None:
    headers = {"Sec-Fetch-Site": site, "Origin": "https://evil.example"}
    assert_error(client.request(method, "/v1/images/variations", headers=headers), 403, code="cross_site")


OTHER_ORIGINS = [
    "https://evil.example",
    "null",
    "http://6.6.6.6",
    "http://127.0.0.1.evil.example",
    "file://",
    "x",
]


@pytest.mark.parametrize("origin", OTHER_ORIGINS)
@pytest.mark.parametrize("host", ["127.0.0.1:8000", "192.168.1.5:8000"])
def test_without_a_key_other_origins_are_rejected(client: httpx.Client, host: str, origin: str) -> None:
    """A form POST needs no preflight, and browsers send no Sec-Fetch-Site to plain http addresses."""
    files = {"image": ("image.png", as_file(gradient()))}
    headers = {"Host": host, "Origin": origin}
    response = client.post("/v1/images/variations", files=files, headers=headers)
    assert_error(response, 403, code="cross_site")


@pytest.mark.parametrize("origin", ["http://localhost:3000", "https://127.0.0.1", "http://192.168.1.5:8000"])
def test_origins_of_this_machine_and_server_are_allowed(client: httpx.Client, origin: str) -> None:
    headers = {"Host": "192.168.1.5:8000", "Origin": origin}
    assert client.post(GENERATIONS, json=QUICK, headers=headers).status_code == 200


@pytest.mark.parametrize("site", ["same-origin", "same-site", "none"])
def test_same_site_requests_are_allowed(client: httpx.Client, site: str) -> None:
    assert client.get("/v1/models", headers={"Sec-Fetch-Site": site}).status_code == 200


def test_other_sites_may_show_stored_images(client: httpx.Client) -> None:
    url = generate(client)["data"][0]["url"]
    assert httpx.get(url, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200


@pytest.mark.parametrize("host", ["public.example", "IMAGES.example:443", "cdn.example", "127.0.0.1"])
def test_hosts_in_the_settings_are_allowed(tight: TightServer, host: str) -> None:
    response = tight.client.post(GENERATIONS, json=QUICK, headers={"Host": host})
    url = response.json()["data"][0]["url"]
    assert url.startswith("https://public.example/hypergen/v1/images/files/")
    assert_error(tight.client.get("/health", headers={"Host": "public.example.evil"}), 403)


@pytest.mark.parametrize("host", [*OTHER_HOSTS, *MALFORMED_HOSTS])
def test_with_a_key_the_host_matters_only_for_urls(keyed_server: LiveServer, host: str) -> None:
    headers = [(b"Host", host.encode()), (b"Sec-Fetch-Site", b"cross-site")]
    with client_of(keyed_server) as client:
        assert client.get("/v1/models", headers=headers).status_code == 200
        for response_format in (None, "b64_json"):
            body = {**QUICK, "response_format": response_format}
            (item,) = client.post(GENERATIONS, json=body, headers=headers).json()["data"]
            assert item["b64_json"]
            assert "url" not in item
        for path in (GENERATIONS, "/v1/images/jobs"):
            response = client.post(path, json={**QUICK, "response_format": "url"}, headers=headers)
            assert_error(response, 400, param="response_format", code="invalid_host")


def test_every_response_has_the_nosniff_header(client: httpx.Client, keyed_server: LiveServer) -> None:
    for response in (
        client.get("/health"),
        client.get("/docs"),
        client.get("/openapi.json"),
        client.get("/metrics"),
        client.get("/nothing"),
        client.post(GENERATIONS, json=QUICK),
        client.post(GENERATIONS, json={}),
        client.post("/generate", json={}),
        client.get("/v1/models", headers={"Host": "evil.example"}),
        httpx.get(keyed_server.url + "/v1/models"),
        httpx.get(generate(client)["data"][0]["url"]),
    ):
        assert response.headers.get_list("x-content-type-options") == ["nosniff"], response.url
