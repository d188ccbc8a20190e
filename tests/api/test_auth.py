"""The API key, which all routes need except health probes, stored images and the web pages."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection

import httpx
import pytest

from tests.support.http_client import GENERATIONS, JSON, QUICK, assert_error, client_of
from tests.support.live_server import LiveServer

KEY = b"sk-right-key"


@pytest.fixture(scope="module")
def client_without_key(keyed_server: LiveServer) -> Iterator[httpx.Client]:
    """A client that sends no key."""
    with httpx.Client(base_url=keyed_server.url, timeout=30) as client:
        yield client


WRONG: dict[str, list[bytes]] = {
    "none": [],
    "empty": [b""],
    "no key": [b"Bearer"],
    "wrong": [b"Bearer sk-wrong-key"],
    "truncated": [b"Bearer sk-right-ke"],
    "too long": [b"Bearer sk-right-keyy"],
    "upper case": [b"Bearer SK-RIGHT-KEY"],
    "bare": [KEY],
    "Basic": [b"Basic " + KEY],
    "another scheme": [b"BearerX " + KEY],
    "no space": [b"Bearer" + KEY],
    "twice Bearer": [b"Bearer Bearer " + KEY],
    "key after another word": [b"Bearer x " + KEY],
    "two keys": [b"Bearer " + KEY + b", Bearer " + KEY],
    "quoted": [b'Bearer "' + KEY + b'"'],
    "two headers": [b"Bearer " + KEY, b"Bearer " + KEY],
    "two headers, one wrong": [b"Bearer " + KEY, b"Bearer x"],
    "not ASCII": [b"Bearer sk-\xff\xfe"],
    "UTF-8": ["Bearer schlüssel".encode()],
    "very long": [b"Bearer " + b"a" * 8000],
}


@pytest.mark.parametrize("values", WRONG.values(), ids=WRONG)
def test_a_wrong_key_is_rejected(client_without_key: httpx.Client, values: list[bytes]) -> None:
    headers = [(b"Authorization", value) for value in values]
    response = client_without_key.post(GENERATIONS, json=QUICK, headers=headers)
    message = assert_error(response, 401, param=None, code="invalid_api_key")
    # LiteLLM matches this text.
    assert message.startswith("Incorrect API key provided")
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert response.headers["www-authenticate"] == "Bearer"
    assert "sk-" not in response.text


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER ", "Bearer  "])
def test_the_right_key_is_accepted(client_without_key: httpx.Client, scheme: str) -> None:
    assert (
        client_without_key.get("/v1/models", headers={"Authorization": f"{scheme}sk-right-key"}).status_code
        == 200
    )


def test_a_key_outside_the_authorization_header_is_ignored(client_without_key: httpx.Client) -> None:
    key = KEY.decode()
    response = client_without_key.get(
        "/v1/models",
        params={"api_key": key, "key": key, "access_token": key},
        headers={"X-Api-Key": key, "Api-Key": key, "Cookie": f"api_key={key}"},
    )
    assert_error(response, 401)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "x/health?"},
        {"X-Original-URL": "/health"},
        {"X-Rewrite-URL": "/health"},
        {"X-Forwarded-Prefix": "/health"},
    ],
    ids=str,
)
def test_headers_do_not_change_the_path_that_is_checked(
    client_without_key: httpx.Client, headers: dict[str, str]
) -> None:
    assert_error(client_without_key.get("/v1/models", headers=headers), 401)


def routes(client: httpx.Client) -> set[str]:
    """Every documented path, HyperGen's and BentoML's."""
    documented = set(client.get("/openapi.json").json()["paths"])
    native = {route["route"] for route in client.get("/schema.json").json()["routes"]}
    assert GENERATIONS in documented
    assert "/generate" in native
    return documented | native


def test_every_route_needs_the_key(keyed_server: LiveServer, client_without_key: httpx.Client) -> None:
    with client_of(keyed_server) as keyed:
        paths = routes(keyed) - {"/health", "/livez", "/healthz", "/readyz"}
    paths = {path.replace("{name}", "x.png").replace("{model}", "m") for path in paths}
    paths |= {
        "/openapi.json",
        "/docs.json",
        "/schema.json",
        "/metrics",
        "/docs",
        "/docs/oauth2-redirect",
        "/docsx",
        "/playground",
        "/playground/x",
        "/redoc",
    }
    paths |= {
        "/",
        "//",
        "/nothing",
        "/v1",
        "/V1/models",
        "//v1/models",
        "/v1/models/",
    }
    paths |= {
        "/Health",
        "/health/",
        "//health",
        "/health%2f..%2fmetrics",
        "/healthz/x",
        "/static/x",
        "/generate/submit",
    }
    paths |= {"/v1/images/files", "/v1/images/filesx"}
    for path in paths:
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE", "FOO"):
            response = client_without_key.request(method, path)
            is_read = method in ("GET", "HEAD")
            is_missing = path.startswith(("/v1/images/files/", "/docs/", "/playground/"))
            is_page = response.url.path in ("/", "/docs", "/openapi.json")  # httpx sends // as /
            status = 401 if not is_read else 404 if is_missing else 200 if is_page else 401
            assert response.status_code == status, (method, path)
            if method != "HEAD" and status != 200:
                assert_error(response, response.status_code)


@pytest.mark.parametrize(
    "path", ["/v1/models/../../health", "/health/../v1/models", "/health/.", "/./health"]
)
def test_dots_in_a_path_are_not_resolved(keyed_server: LiveServer, path: str) -> None:
    # httpx would resolve them before it sends them.
    with closing(HTTPConnection(keyed_server.url.removeprefix("http://"), timeout=10)) as connection:
        connection.request("GET", path)
        assert connection.getresponse().status == 401


def test_clients_without_a_key_get_401_before_they_send_the_body(keyed_server: LiveServer) -> None:
    host, port = keyed_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = [f"POST {GENERATIONS} HTTP/1.1", f"Host: {host}", "Content-Length: 9", "Expect: 100-continue"]
        connection.sendall("\r\n".join([*head, "", ""]).encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("path", ["/health", "/livez", "/readyz", "/healthz"])
def test_health_probes_need_no_key(client_without_key: httpx.Client, path: str) -> None:
    assert client_without_key.get(path).status_code == 200


def test_the_key_is_checked_before_the_body_is_read(client_without_key: httpx.Client) -> None:
    bodies = [b"{", b"[" * 100_000, b"a" * 30_000_000]
    for body in bodies:
        assert_error(client_without_key.post(GENERATIONS, content=body, headers=JSON), 401)
    # The body was not read completely, so the connection cannot carry another request.
    assert client_without_key.post(GENERATIONS, content=b"{").headers["connection"] == "close"


def test_a_server_without_a_key_ignores_the_header(client: httpx.Client) -> None:
    for value in ("Bearer x", "Basic x", "x"):
        assert client.get("/v1/models", headers={"Authorization": value}).status_code == 200


def test_the_key_is_not_in_the_log_or_on_a_command_line(keyed_server: LiveServer) -> None:
    assert KEY.decode() not in keyed_server.log()
    assert not [p for p in keyed_server.processes() if KEY.decode() in " ".join(p.cmdline())]
    assert "HYPERGEN_API_KEY" not in keyed_server.engine().environ()
