"""Web pages of other origins, on servers that allow them and on servers that do not."""

from __future__ import annotations

import httpx
import pytest
from starlette.responses import Response

from hypergen.api.api_keys import ApiKeys
from hypergen.api.middleware import OuterMiddleware
from hypergen.config import Settings
from tests.api.conftest import CORS_ORIGIN, TightServer
from tests.support.http_client import GENERATIONS, QUICK, assert_error

OTHER_ORIGIN = "https://evil.example"
CROSS_SITE = {"Origin": CORS_ORIGIN, "Sec-Fetch-Site": "cross-site"}
ROUTES = [
    ("GET", "/health", 200),
    ("GET", "/v1/models", 200),
    ("GET", "/v1/models/none", 404),
    ("GET", "/v1/nothing", 404),
    ("DELETE", "/v1/models", 405),
    ("POST", GENERATIONS, 400),
    ("POST", "/generate", 400),
    ("GET", "/metrics", 200),
    ("GET", "/v1/images/files/none.png", 404),
]


def preflight(client: httpx.Client, path: str, origin: str = CORS_ORIGIN) -> httpx.Response:
    """As browsers send it for a request with a key and a JSON body."""
    headers = {
        "Origin": origin,
        "Sec-Fetch-Site": "cross-site",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    return client.options(path, headers=headers)


@pytest.mark.parametrize(("method", "path", "status"), ROUTES)
def test_every_route_and_error_answers_pages_of_an_allowed_origin(
    tight: TightServer, method: str, path: str, status: int
) -> None:
    response = tight.client.request(method, path, headers=CROSS_SITE, json={} if method == "POST" else None)
    assert response.status_code == status, response.text
    assert response.headers["access-control-allow-origin"] == CORS_ORIGIN
    assert "x-request-id" in response.headers["access-control-expose-headers"]
    assert response.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in response.headers


def test_a_page_of_an_allowed_origin_generates_images(tight: TightServer) -> None:
    response = tight.client.post(GENERATIONS, json=QUICK, headers=CROSS_SITE)
    assert response.status_code == 200, response.text
    assert response.headers["access-control-allow-origin"] == CORS_ORIGIN


@pytest.mark.parametrize("path", [GENERATIONS, "/v1/models", "/generate", "/v1/nothing"])
def test_preflight_requests_of_an_allowed_origin_are_answered(tight: TightServer, path: str) -> None:
    response = preflight(tight.client, path)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == CORS_ORIGIN
    assert response.headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-lang"
    assert "POST" in response.headers["access-control-allow-methods"]
    assert response.headers["x-request-id"].startswith("req_")


def test_other_origins_and_other_hosts_are_rejected(tight: TightServer) -> None:
    for response in (
        preflight(tight.client, GENERATIONS, OTHER_ORIGIN),
        tight.client.post(GENERATIONS, json=QUICK, headers={"Origin": OTHER_ORIGIN}),
        tight.client.get("/v1/models", headers=[("Origin", CORS_ORIGIN), ("Origin", OTHER_ORIGIN)]),
    ):
        assert_error(response, 403, code="cross_site")
        assert response.headers.get("access-control-allow-origin") != OTHER_ORIGIN
    rebound = tight.client.get("/v1/models", headers={**CROSS_SITE, "Host": "evil.example"})
    assert_error(rebound, 403, code="forbidden_host")


def test_without_the_setting_no_origin_is_allowed(client: httpx.Client) -> None:
    for response in (preflight(client, GENERATIONS), client.get("/v1/models", headers=CROSS_SITE)):
        assert_error(response, 403, code="cross_site")
        assert not [name for name in response.headers if name.startswith("access-control")]
    same_site = client.get("/v1/models", headers={"Origin": "http://localhost:3000"})
    assert not [name for name in same_site.headers if name.startswith("access-control")]
    assert "vary" not in same_site.headers


@pytest.fixture
def keyed() -> httpx.AsyncClient:
    """A server with a key that allows every origin."""
    settings = Settings.model_validate({"server": {"cors_origin": ["*"], "api_key": "secret"}})
    app = OuterMiddleware(Response("done"), ApiKeys(settings.server), settings)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://hypergen.example")


async def test_with_a_key_a_preflight_request_needs_none_and_the_401_can_be_read(
    keyed: httpx.AsyncClient,
) -> None:
    headers = {"Origin": OTHER_ORIGIN, "Access-Control-Request-Method": "POST"}
    answered = await keyed.options("/v1/models", headers=headers)
    assert (answered.status_code, answered.headers["access-control-allow-origin"]) == (200, "*")
    refused = await keyed.post("/v1/models", headers={"Origin": OTHER_ORIGIN})
    assert_error(refused, 401)
    assert refused.headers["access-control-allow-origin"] == "*"
    headers = {"Origin": OTHER_ORIGIN, "Authorization": "Bearer secret"}
    accepted = await keyed.post("/v1/models", headers=headers)
    assert (accepted.text, accepted.headers["access-control-allow-origin"]) == ("done", "*")
    plain = await keyed.options("/v1/models", headers={"Origin": OTHER_ORIGIN})
    assert_error(plain, 401)


async def test_a_method_that_no_route_has_is_refused_in_a_preflight_request(keyed: httpx.AsyncClient) -> None:
    headers = {"Origin": OTHER_ORIGIN, "Access-Control-Request-Method": "TRACE"}
    assert_error(await keyed.options("/v1/models", headers=headers), 400)
