"""Options of `hypergen serve` for its address: a free port, TLS, and the path of a proxy."""

from __future__ import annotations

import os
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from hypergen.cli.main import main
from hypergen.errors import ConfigurationError
from tests.support.http_client import GENERATIONS, QUICK


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, certificate: tuple[Path, Path]
) -> Iterator[httpx.Client]:
    """A client of a server with a key, TLS, a free port and the path of a proxy."""
    folder = tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "hypergen.cli.main", "serve", "--port", "0", "--root-path", "/images"]
    command += [
        "--ssl-certfile",
        str(certificate[0]),
        "--ssl-keyfile",
        str(certificate[1]),
        "--device",
        "cpu",
    ]
    environment = {**os.environ, "BENTOML_HOME": str(folder / "bentoml"), "HYPERGEN_API_KEY": "secret"}
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=folder)
    try:
        until = time.monotonic() + 120
        while not (found := re.search(r"Ready after .* (https://127\.0\.0\.1:\d+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until
            time.sleep(0.2)
        context = ssl.create_default_context(cafile=str(certificate[0]))
        with httpx.Client(
            base_url=found[1], verify=context, timeout=60, headers={"Authorization": "Bearer secret"}
        ) as client:
            yield client
    finally:
        process.terminate()
        process.wait()


def test_the_server_speaks_https_on_a_free_port(server: httpx.Client) -> None:
    assert server.base_url.port not in (0, 8000)
    body = server.post(GENERATIONS, json={**QUICK, "response_format": "url"}).json()
    url = body["data"][0]["url"]
    assert url.startswith(f"{str(server.base_url).rstrip('/')}/images/v1/images/files/")
    assert server.get(url.replace("/images/v1", "/v1", 1)).content.startswith(b"\x89PNG")  # as the proxy does
    assert server.get("/openapi.json").json()["servers"] == [{"url": "/images"}]
    job = server.post("/v1/images/jobs", json=QUICK)
    assert job.headers["location"].startswith("/images/v1/images/jobs/job_")


def test_without_the_key_health_is_the_status_alone(
    server: httpx.Client, certificate: tuple[Path, Path]
) -> None:
    everything = server.get("/health").json()
    assert everything["version"]
    assert 0 <= everything["uptime_s"] < 600
    assert everything["queue_size"] <= 1  # the job
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        context = ssl.create_default_context(cafile=str(certificate[0]))
        response = httpx.get(server.base_url.join("/health"), headers=headers, verify=context)
        assert (response.status_code, response.json()) == (200, {"status": "healthy"})


def test_a_certificate_needs_its_key(certificate: tuple[Path, Path]) -> None:
    for flag, file in zip(("--ssl-certfile", "--ssl-keyfile"), certificate, strict=True):
        result = CliRunner().invoke(main, ["serve", flag, str(file)])
        assert isinstance(result.exception, ConfigurationError)
        assert "certificate and key must be given together" in str(result.exception)
