"""Clients of the shared servers, and one more server whose limits are so tight that tests reach them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.support.health_latency import HealthLatency
from tests.support.http_client import GENERATIONS, QUICK, client_of
from tests.support.live_server import LiveServer, start_server

TIGHT = {
    "HYPERGEN_MAX_QUEUE_SIZE": "1",
    "HYPERGEN_QUEUE_TIMEOUT": "0",
    "HYPERGEN_REQUEST_TIMEOUT": "2",
    "HYPERGEN_MAX_BODY_MB": "0.1",
    "HYPERGEN_MAX_JOBS": "3",
    "HYPERGEN_MAX_INPUT_IMAGE_MB": "0.01",
    "HYPERGEN_PRICE_RATE": "0.01",
    "HYPERGEN_IMAGE_METADATA": "false",
    "HYPERGEN_ALLOWED_HOST": "images.example, cdn.example",
    "HYPERGEN_PUBLIC_URL": "https://pictures.example/hypergen/",
    "HYPERGEN_SERVED_MODEL_NAME": "owner/small-sd",
}


@dataclass(frozen=True)
class TightServer:
    """A server with little room, and how it behaved while its model was still loading."""

    server: LiveServer
    client: httpx.Client
    health_while_loading: httpx.Response
    refusal_while_loading: httpx.Response
    models_while_loading: httpx.Response
    probe_while_loading: HealthLatency


@pytest.fixture(scope="session")
def client(server: LiveServer) -> Iterator[httpx.Client]:
    """Of the server without a key."""
    with client_of(server) as client:
        yield client


@pytest.fixture(scope="session")
def tight(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Iterator[TightServer]:
    with start_tight_server(tmp_path_factory.mktemp("tight"), sd_folder) as tight:
        yield tight


@contextmanager
def start_tight_server(folder: Path, model: Path) -> Iterator[TightServer]:
    """A server with little room until the block is left, asked from its first answer on.

    Args:
        folder: an empty folder for the model store and the log.
        model: the model that it draws with.
    """
    arguments = (str(model), "--device", "cpu", "--dtype", "float32")
    with (
        start_server(folder, *arguments, environment=TIGHT, wait=False) as server,
        client_of(server) as client,
    ):
        health = client.get("/health")
        refusal = client.post(GENERATIONS, json=QUICK)
        models = client.get("/v1/models")
        probe = HealthLatency()
        until = time.monotonic() + 60
        while probe.request_health(client)["status"] != "healthy" and time.monotonic() < until:
            pass
        yield TightServer(server, client, health, refusal, models, probe)
