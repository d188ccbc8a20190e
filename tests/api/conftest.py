"""Clients of the shared servers, and a server with tight limits."""

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

CORS_ORIGIN = "https://app.example"
TIGHT = {
    "HYPERGEN_MAX_QUEUE_SIZE": "1",
    "HYPERGEN_QUEUE_TIMEOUT": "0",
    "HYPERGEN_REQUEST_TIMEOUT": "2",
    "HYPERGEN_MAX_BODY_MB": "0.1",
    "HYPERGEN_MAX_JOBS": "3",
    "HYPERGEN_KEEP_ALIVE": "3",
    "HYPERGEN_CORS_ORIGIN": f"http://localhost:3000,{CORS_ORIGIN}",
    "HYPERGEN_MAX_INPUT_IMAGE_MB": "0.01",
    "HYPERGEN_PRICE_RATE": "0.01",
    "HYPERGEN_IMAGE_METADATA": "false",
    "HYPERGEN_ALLOWED_HOST": "images.example, cdn.example",
    "HYPERGEN_PUBLIC_URL": "https://public.example/hypergen/",
    "HYPERGEN_SERVED_MODEL_NAME": "owner/small-sd",
}


# What an operator runs: a key, prices, a short queue, and a log for programs.
OBSERVED = {
    "HYPERGEN_LOG_FORMAT": "json",
    "HYPERGEN_MAX_QUEUE_SIZE": "1",
    "HYPERGEN_QUEUE_TIMEOUT": "0",
    "HYPERGEN_PRICE_RATE": "0.01",
    "HYPERGEN_SERVED_MODEL_NAME": "owner/small-sd",
    "TZ": "Asia/Tokyo",  # the log has UTC
}


@dataclass(frozen=True)
class TightServer:
    """A server with tight limits, and its responses while the model was loading."""

    server: LiveServer
    client: httpx.Client
    health_while_loading: httpx.Response
    error_while_loading: httpx.Response
    models_while_loading: httpx.Response
    probe_while_loading: HealthLatency


@pytest.fixture(scope="session")
def client(server: LiveServer) -> Iterator[httpx.Client]:
    """A client of the server without a key."""
    with client_of(server) as client:
        yield client


@pytest.fixture(scope="module")
def observed(
    tmp_path_factory: pytest.TempPathFactory, sd_folder: Path, lora_folder: Path
) -> Iterator[LiveServer]:
    """A server of one file, whose figures and log lines its tests read; with `OBSERVED`."""
    folder = tmp_path_factory.mktemp("observed")
    temporary = folder / "temporary"
    temporary.mkdir()
    arguments = (str(sd_folder), "--device", "cpu", "--dtype", "float32", "--lora-dir", str(lora_folder))
    environment = {**OBSERVED, "TMPDIR": str(temporary)}
    with start_server(
        folder / "server", *arguments, environment=environment, api_key="sk-observed"
    ) as server:
        yield server


@pytest.fixture(scope="session")
def tight(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Iterator[TightServer]:
    with start_tight_server(tmp_path_factory.mktemp("tight"), sd_folder) as tight:
        yield tight


@contextmanager
def start_tight_server(folder: Path, model: Path) -> Iterator[TightServer]:
    """A server with tight limits; sends requests as soon as it responds.

    Args:
        folder: an empty folder for the model store and the log.
        model: folder of the served model.
    """
    arguments = (str(model), "--device", "cpu", "--dtype", "float32")
    with (
        start_server(folder, *arguments, environment=TIGHT, wait=False) as server,
        client_of(server) as client,
    ):
        health = client.get("/health")
        error = client.post(GENERATIONS, json=QUICK)
        models = client.get("/v1/models")
        probe = HealthLatency()
        until = time.monotonic() + 60
        while probe.request_health(client)["status"] != "healthy" and time.monotonic() < until:
            pass
        yield TightServer(server, client, health, error, models, probe)
