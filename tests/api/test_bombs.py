"""Bodies that once blocked the server, sent in a loop by four clients while others get responses."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.api.test_image_files import with_scans
from tests.support.http_client import GENERATIONS, JSON, QUICK, client_of
from tests.support.image_files import as_data_url, as_file, gradient
from tests.support.live_server import LiveServer

EDITS = "/v1/images/edits"
CLIENTS = 4
LOOP_S = 4.0
MAX_LATENCY_S = 1.0


def edit(image: str) -> bytes:
    return json.dumps({**QUICK, "images": [{"image_url": image}]}).encode()


def slowest_jpeg() -> bytes:
    """The maximum of scans and pixels: 3 s in one of the two decoding threads."""
    start = as_file(Image.new("L", (8000, 5000)), "JPEG", progressive=True)
    return with_scans(100, start)


def large_json(content: str) -> bytes:
    if content == "lists":
        return b'{"x":[' + b",".join([b"[]"] * 8_000_000) + b"]}"
    loras = ",".join(f'"{number}":""' for number in range(1_800_000))
    return b'{"prompt":"a","loras":{' + loras.encode() + b"}}"


# Number of the fixed bug and the body -> path, body, and allowed statuses.
BOMBS: dict[str, tuple[str, Callable[[], bytes], set[int]]] = {
    "2: a JPEG of 2,000 scans": (EDITS, lambda: edit(as_data_url(with_scans(2000), "image/jpeg")), {400}),
    "2: the largest JPEG that is decoded": (EDITS, lambda: edit(as_data_url(slowest_jpeg())), {200}),
    "3: 23 MB of data:;;;": (EDITS, lambda: edit("data:" + ";" * 23_000_000), {400}),
    "4: 40,000 items of the batchable API": (
        "/generate",
        lambda: json.dumps({"items": [{"n": 0}] * 40_000}).encode(),
        {400},
    ),
    "8: 24 MB of empty lists": (GENERATIONS, lambda: large_json("lists"), {400, 413}),
    "8: 20 MB of invalid LoRAs": (GENERATIONS, lambda: large_json("loras"), {400, 413}),
}


class Sender(threading.Thread):
    """One client that sends a body in a loop until `stop` is set."""

    def __init__(self, server: LiveServer, path: str, body: bytes, stop: threading.Event) -> None:
        super().__init__()
        self._server, self._path, self._body, self._stop_sending = server, path, body, stop
        self.statuses: list[int] = []

    def run(self) -> None:
        with client_of(self._server) as client:
            while not self._stop_sending.is_set():
                self.statuses.append(client.post(self._path, content=self._body, headers=JSON).status_code)


@pytest.mark.parametrize("bomb", BOMBS)
def test_health_and_other_clients_get_responses_within_a_second(
    server: LiveServer, client: httpx.Client, bomb: str
) -> None:
    """/health responds within 1 s each time; generations and an edit succeed."""
    path, make, statuses = BOMBS[bomb]
    stop = threading.Event()
    senders = [Sender(server, path, make(), stop) for _ in range(CLIENTS)]
    good: dict[str, Any] = {**QUICK, "images": [{"image_url": as_data_url(as_file(gradient()))}]}
    for sender in senders:
        sender.start()
    health_s: list[float] = []
    edited = threading.Thread(target=lambda: client.post(EDITS, json=good).raise_for_status())
    try:
        edited.start()
        until = time.monotonic() + LOOP_S
        while time.monotonic() < until:
            started = time.monotonic()
            assert client.get("/health").status_code == 200
            health_s.append(time.monotonic() - started)
            assert client.post(GENERATIONS, json=QUICK).status_code == 200
        edited.join(60)
        assert not edited.is_alive()
    finally:
        stop.set()
        for sender in senders:
            sender.join()
    assert {status for sender in senders for status in sender.statuses} <= statuses
    assert all(sender.statuses for sender in senders)
    assert max(health_s) < MAX_LATENCY_S, sorted(health_s)[-3:]


def test_images_of_disconnected_clients_are_not_decoded(server: LiveServer, client: httpx.Client) -> None:
    """Sixteen of the slowest images take the two decoding threads about 25 s; their clients disconnect."""
    host, port = server.url.removeprefix("http://").split(":")
    body = BOMBS["2: the largest JPEG that is decoded"][1]()
    head = f"POST {EDITS} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    for _ in range(16):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
            time.sleep(0.05)
    good = {**QUICK, "images": [{"image_url": as_data_url(as_file(gradient()))}]}
    started = time.monotonic()
    assert client.post(EDITS, json=good).status_code == 200
    assert time.monotonic() - started < 12
