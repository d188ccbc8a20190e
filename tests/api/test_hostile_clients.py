"""Clients that read nothing, send nothing or disconnect, and a server with few file descriptors."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support.http_client import GENERATIONS, QUICK, client_of
from tests.support.image_files import as_data_url
from tests.support.live_server import LiveServer, start_server

DESCRIPTORS = 400
TIMEOUT_S = 8
_WITH_FEW_DESCRIPTORS = (
    f"import resource, os, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({DESCRIPTORS}, {DESCRIPTORS})); "
    "os.execv(sys.executable, [sys.executable, '-m', 'hypergen.cli.main', 'serve', *sys.argv[1:]])"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Iterator[LiveServer]:
    """A server with 400 file descriptors, a queue size of 1 and a request timeout of 8 s."""
    folder = tmp_path_factory.mktemp("hostile")
    arguments = (str(sd_folder), "--device", "cpu", "--dtype", "float32", "--max-queue-size", "1")
    program = (sys.executable, "-c", _WITH_FEW_DESCRIPTORS)
    with start_server(folder, *arguments, "--request-timeout", str(TIMEOUT_S), program=program) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with client_of(server) as client:
        yield client


def noise(side: int) -> bytes:
    """A PNG of noise, which no encoder can compress."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def connect(server: LiveServer, receive_buffer: int | None = None) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(60)
    connection.connect((host, int(port)))
    return connection


def post(connection: socket.socket, path: str, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)


def echo_request(**fields: Any) -> dict[str, Any]:
    """An edit that returns its noisy input image ten times, about 30 MB, without denoising."""
    images = [{"image_url": as_data_url(noise(1024))}]
    return {"prompt": "a", "images": images, "strength": 0, "n": 10, "size": "1024x1024", **fields}


def test_500_idle_connections_do_not_block_health(server: LiveServer) -> None:
    """More connections than file descriptors, each with an incomplete head."""
    with ExitStack() as stack:
        for _ in range(500):
            connection = stack.enter_context(connect(server))
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        for _ in range(5):
            started = time.monotonic()
            assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200
            assert time.monotonic() - started < 3  # asyncio waits a second if it has no descriptors left
    assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200
    assert server.log().count("socket.accept() out of system resource") <= 1  # of thousands


def test_an_unread_stream_ends_at_its_deadline_and_blocks_no_other_client(
    server: LiveServer, client: httpx.Client
) -> None:
    with connect(server, receive_buffer=4096) as unread:
        post(unread, "/v1/images/edits", echo_request(stream=True))
        assert unread.recv(12) == b"HTTP/1.1 200"
        until = time.monotonic() + TIMEOUT_S
        while client.get("/health").json()["queue_size"]:  # the queue is free soon
            assert time.monotonic() < until
            time.sleep(0.05)
        engine = server.engine()
        engine.kill()
        while client.get("/health").json()["status"] != "recovering":
            time.sleep(0.02)
        while client.get("/health").json()["status"] != "healthy":
            time.sleep(0.1)
        assert client.post(GENERATIONS, json=QUICK).status_code == 200
        # The deadline of the request closes the connection before the end of the response.
        time.sleep(max(0.0, until + 2 - time.monotonic()))
        received = b""
        try:
            while data := unread.recv(1 << 20):
                received += data
        except ConnectionError:
            pass
        assert len(received) < 20_000_000
    assert "closed the connection; the response was not finished" in server.log()


def test_unread_responses_are_aborted_beyond_the_memory_limit(tmp_path: Path, sd_folder: Path) -> None:
    """Forty clients request the 42 MB of a job each; the limit is 100 MB."""
    arguments = (str(sd_folder), "--device", "cpu", "--max-input-image-mb", "100")
    with ExitStack() as stack:
        server = stack.enter_context(start_server(tmp_path, *arguments))
        client = stack.enter_context(client_of(server))
        job = client.post("/v1/images/jobs", json=echo_request(response_format="b64_json")).json()
        while (state := client.get(f"/v1/images/jobs/{job['id']}").json())["status"] != "succeeded":
            assert state["status"] in ("queued", "running")
            time.sleep(0.1)
        worker = next(p for p in server.processes() if any("_bentoml_impl" in part for part in p.cmdline()))
        before = worker.memory_info().rss
        for _ in range(40):
            unread = stack.enter_context(connect(server, receive_buffer=4096))
            unread.sendall(f"GET /v1/images/jobs/{job['id']} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            assert unread.recv(12) == b"HTTP/1.1 200"
        # 100 MB of responses, plus 32 MB of files while each is built; 1.7 GB without the limit.
        assert worker.memory_info().rss - before < 600e6
        # A client that reads gets the complete response.
        assert len(client.get(f"/v1/images/jobs/{job['id']}").content) > 40_000_000


FORM = "multipart/form-data; boundary=x"


@pytest.mark.parametrize(
    ("path", "media_type"),
    [(path, "application/json") for path in (GENERATIONS, "/v1/images/edits", "/v1/images/jobs", "/generate")]
    + [(path, FORM) for path in ("/v1/images/edits", "/v1/images/jobs")],
)
def test_a_disconnect_during_the_body_is_one_log_line_with_499(
    server: LiveServer, client: httpx.Client, path: str, media_type: str
) -> None:
    before = len(server.log())
    with connect(server) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {media_type}\r\n"
        head += "Content-Length: 1000\r\n\r\n"
        connection.sendall(head.encode() + b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na')
    until = time.monotonic() + 10
    while f"POST {path} 499 " not in server.log()[before:]:
        assert time.monotonic() < until, server.log()[before:]
        time.sleep(0.05)
    time.sleep(0.2)
    lines = [line for line in server.log()[before:].splitlines() if "/health" not in line]
    assert len(lines) == 1, lines


def test_a_malformed_form_is_one_log_line(server: LiveServer, client: httpx.Client) -> None:
    before = len(server.log())
    headers = {"Content-Type": FORM}
    assert client.post("/v1/images/edits", content=b"--x\r\nno header\r\n\r\n", headers=headers).is_error
    time.sleep(0.2)
    assert len(server.log()[before:].splitlines()) == 1, server.log()[before:]
