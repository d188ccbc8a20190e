"""Clients that disconnect, and the latency of /health during generation."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.api.conftest import TightServer, start_tight_server
from tests.support.health_latency import HealthLatency, assert_prompt
from tests.support.http_client import GENERATIONS, QUICK, SLOW, assert_error, client_of, generate
from tests.support.image_files import as_data_url, as_file, gradient
from tests.support.live_server import LiveServer


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.02)


def disconnect(server: LiveServer, after_s: float) -> None:
    """A client that closes the connection after this time."""
    with client_of(server) as client, pytest.raises(httpx.ReadTimeout):
        client.post(GENERATIONS, json=SLOW, timeout=httpx.Timeout(10, read=after_s))


def test_a_disconnect_frees_the_queue_and_the_engine(server: LiveServer) -> None:
    def image_steps() -> int:
        return server.health()["engines"][0]["image_steps"]

    before = image_steps()
    with ThreadPoolExecutor(1) as pool:
        disconnecting = pool.submit(disconnect, server, 1.2)
        wait_until(lambda: server.health()["running"] == 1, 5)
        disconnecting.result()
    wait_until(lambda: server.health()["queue_size"] == 0, 1)
    time.sleep(1.2)  # the engine reports its steps once a second
    done = image_steps()
    assert before < done < before + SLOW["n"] * SLOW["num_inference_steps"]
    time.sleep(1.2)
    assert image_steps() == done


def test_disconnects_do_not_affect_other_clients(server: LiveServer, client: httpx.Client) -> None:
    alone = generate(client, seed=3, num_inference_steps=20)["data"][0]["b64_json"]
    with ThreadPoolExecutor(3) as pool:
        disconnecting = [pool.submit(disconnect, server, 0.3) for _ in range(3)]
        with_others = generate(client, seed=3, num_inference_steps=20)["data"][0]["b64_json"]
        for each in disconnecting:
            each.result()
    assert with_others == alone
    wait_until(lambda: server.health()["queue_size"] == 0, 1)


def test_input_images_beyond_their_memory_limit_are_rejected(tight: TightServer) -> None:
    body = {"prompt": "a", "images": [{"image_url": as_data_url(as_file(gradient(64, 64)))}]}
    job = tight.client.post("/v1/images/jobs", json={**body, "num_inference_steps": 150, "n": 10}).json()
    wait_until(lambda: tight.server.health()["queue_size"] == 1, 5)
    response = tight.client.post("/v1/images/edits", json={**body, "num_inference_steps": 1})
    tight.client.delete(f"/v1/images/jobs/{job['id']}")
    assert "input images" in assert_error(response, 429, code="rate_limit_exceeded")
    assert 1 <= int(response.headers["retry-after"]) <= 60
    generate(tight.client)  # a request without input images
    assert tight.client.post("/v1/images/edits", json={**body, "num_inference_steps": 1}).status_code == 200


def test_health_responds_quickly_while_images_are_generated(server: LiveServer, client: httpx.Client) -> None:
    def probe_generation() -> HealthLatency:
        probe = HealthLatency()
        queue_sizes: set[int] = set()
        with ThreadPoolExecutor(8) as pool, httpx.Client(base_url=server.url) as looking:
            body = {**QUICK, "num_inference_steps": 60}
            responses = [pool.submit(client.post, GENERATIONS, json=body) for _ in range(8)]
            while len(probe.response_times_s) < 200 or not all(each.done() for each in responses):
                queue_sizes.add(probe.request_health(looking)["queue_size"])
        assert {each.result().status_code for each in responses} == {200}
        assert max(queue_sizes) == 8
        return probe

    assert_prompt(probe_generation)


def test_health_responds_quickly_while_the_model_loads(
    tight: TightServer, tmp_path_factory: pytest.TempPathFactory, sd_folder: Path
) -> None:
    probes = [tight.probe_while_loading]

    def probe_loading() -> HealthLatency:
        if probes:
            return probes.pop()
        with start_tight_server(tmp_path_factory.mktemp("again"), sd_folder) as another:
            return another.probe_while_loading

    assert len(tight.probe_while_loading.response_times_s) > 5
    assert_prompt(probe_loading)
