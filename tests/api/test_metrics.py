"""Metric labels, which do not depend on the paths that clients request."""

from __future__ import annotations

import re
import uuid

import httpx

from hypergen.bentoml_integration.metric_paths import OTHER, endpoint_name
from tests.support.http_client import generate
from tests.support.live_server import LiveServer


def test_requests_are_counted_by_endpoint_and_not_by_path(server: LiveServer) -> None:
    secret = uuid.uuid4().hex
    with httpx.Client(base_url=server.url, timeout=60) as client:
        generate(client, size="64x64")
        for path in (f"/{secret}", f"/v1/models/{secret}", f"/v1/images/files/{secret}", f"/livez/{secret}"):
            assert client.get(path).status_code == 404
        assert client.post(f"/v1/images/generations/{secret}").status_code == 404
        metrics = client.get("/metrics").text
    assert secret not in metrics
    endpoints = set(re.findall(r'endpoint="([^"]*)"', metrics))
    assert {OTHER, "/v1/images/generations", "/v1/models/{model}", "/health"} <= endpoints


def test_every_documented_path_has_its_own_label(server: LiveServer) -> None:
    documented = httpx.get(f"{server.url}/openapi.json", timeout=60).json()["paths"]
    assert {endpoint_name(path) for path in documented} == set(documented)
