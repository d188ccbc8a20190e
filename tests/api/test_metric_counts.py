"""HyperGen's metrics: exact figures of known traffic, on a server that gets no other requests."""

from __future__ import annotations

import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from hypergen.api.dialects.endpoints import ENDPOINTS
from tests.support.http_client import GENERATIONS, QUICK, SLOW, assert_error, client_of
from tests.support.live_server import LiveServer, start_server
from tests.support.log_lines import json_lines, logged, text_fields
from tests.support.metric_samples import samples_of, total, wait_for

HYPERBOLIC = "/v1/image/generation"
MODEL = "owner/small-sd"
SIDE = {"width": 128, "height": 128}

KEY = "api-key"

# Each metric of the documents with its labels and their possible values; None: any number.
ENGINE = {"engine": {"0"}}
ON_MODEL = {"model": {MODEL}}
LABELS: dict[str, dict[str, set[str]]] = {
    "requests_total": {
        "model": {MODEL, ""},
        "endpoint": {*(endpoint.path for endpoint in ENDPOINTS), "job", "/generate"},
        "outcome": {"ok", "invalid", "unauthorized", "rejected", "cancelled"},
    },
    "key_requests_total": {
        "key": {"anonymous", KEY},
        "outcome": {"ok", "invalid", "unauthorized", "rejected", "cancelled"},
    },
    "key_images_total": {"key": {KEY}},
    "request_seconds": {
        "endpoint": {*(endpoint.path for endpoint in ENDPOINTS), "job", "/generate"},
        "outcome": {"ok", "invalid", "unauthorized", "rejected", "cancelled"},
    },
    "rejected_total": {"reason": {"rate_limit_exceeded"}},
    "price_total": ON_MODEL,
    "images_total": ON_MODEL,
    "denoising_steps_total": ON_MODEL,
    "stage_seconds": {**ON_MODEL, "stage": {"queue", "encode", "denoise", "decode", "write"}},
    "step_seconds": ON_MODEL,
    "batch_images": ON_MODEL,
    "batch_rows": ON_MODEL,
    "queue_running": {},
    "queue_waiting": {},
    "queue_overflow": {},
    "shared_jobs_waiting": {},
    "state": {"state": {"loading", "ready", "recovering", "failed", "draining"}},
    "engine_up": ENGINE,
    "engine_requests": ENGINE,
    "engine_restarts_total": ENGINE,
    "models_in_memory": ENGINE,
    "model_load_seconds": {**ENGINE, **ON_MODEL},
    "device_memory_bytes": {**ENGINE, "kind": {"resident"}},
    "cache_hits_total": {**ENGINE, "cache": {"prompt", "lora"}},
    "cache_misses_total": {**ENGINE, "cache": {"prompt", "lora"}},
    "lora_loaded": ENGINE,
    "batch_invariant": {**ENGINE, "verdict": {"exact", "close"}},
    "build_info": {"version": set(), "python": set()},
}


@dataclass(frozen=True)
class Traffic:
    """The server after known traffic.

    Attributes:
        steps, forwards: counted before the clients of `left` requests disconnected.
        refused: requests that got 429.
    """

    server: LiveServer
    client: httpx.Client
    steps: float
    forwards: float
    left: int
    refused: int


def _finish_job(client: httpx.Client, body: dict[str, Any]) -> None:
    location = client.post("/v1/images/jobs", json=body).headers["location"]
    until = time.monotonic() + 60
    while client.get(location).json()["status"] != "succeeded":
        assert time.monotonic() < until
        time.sleep(0.02)


def _fill_queue_then_disconnect(server: LiveServer) -> tuple[int, int]:
    """Four slow requests for a queue of one; returns how many clients disconnected and how many got 429."""
    slow = {**SLOW, "size": "512x512"}  # whose preparation alone takes seconds

    def post_and_leave(_: int) -> bool:
        with client_of(server) as client:
            try:
                response = client.post(GENERATIONS, json=slow, timeout=httpx.Timeout(60, read=5))
            except httpx.ReadTimeout:
                return True
        assert_error(response, 429, code="rate_limit_exceeded")
        return False

    with ThreadPoolExecutor(4) as clients:
        left = list(clients.map(post_and_leave, range(4)))
    assert set(left) == {True, False}
    return left.count(True), left.count(False)


@pytest.fixture(scope="module")
def traffic(observed: LiveServer) -> Iterator[Traffic]:
    with client_of(observed) as client:
        assert client.post(GENERATIONS, json={**QUICK, "num_inference_steps": 2, "n": 2}).status_code == 200
        styled = {**QUICK, "loras": {"style": 1.0}}
        assert client.post(GENERATIONS, json=styled).status_code == 200
        assert client.post(GENERATIONS, json=styled).status_code == 200
        stream = client.post(GENERATIONS, json={**QUICK, "stream": True})
        assert stream.text.startswith("event: image_generation.completed")
        hyperbolic = {"model_name": MODEL, "prompt": "a", "steps": 5, **SIDE}
        assert client.post(HYPERBOLIC, json=hyperbolic).status_code == 200
        _finish_job(client, QUICK)
        items = client.post("/generate", json={"items": [QUICK, {**QUICK, "n": 99}]}).json()
        assert [item["status"] for item in items] == [200, 400]
        assert_error(client.post(GENERATIONS, json={**QUICK, "n": 99}), 400)
        assert_error(client.post(HYPERBOLIC, json={"prompt": "a"}), 400)
        for _ in range(3):
            assert_error(httpx.post(observed.url + GENERATIONS, json=QUICK), 401)
        assert client.get(GENERATIONS).status_code == 405
        # The engine reports forward passes without waiting for anything.
        steps = wait_for(client, "hypergen_denoising_steps_total", lambda value: value >= 14)
        forwards = total(client, "hypergen_step_seconds_count")
        left, refused = _fill_queue_then_disconnect(observed)
        wait_for(client, "hypergen_requests_total", lambda value: value == left, outcome="cancelled")
        wait_for(client, "hypergen_queue_running", lambda value: value == 0)
        yield Traffic(observed, client, steps, forwards, left, refused)


def test_every_request_for_images_is_counted_once_with_its_outcome(traffic: Traffic) -> None:
    counted = Counter[tuple[str, str, str]]()
    for sample in samples_of(traffic.client, "hypergen_requests_total"):
        labels = sample.labels
        counted[labels["endpoint"], labels["model"], labels["outcome"]] += int(sample.value)
    assert counted == {
        (GENERATIONS, MODEL, "ok"): 4,
        (HYPERBOLIC, MODEL, "ok"): 1,
        ("job", MODEL, "ok"): 1,
        ("/generate", MODEL, "ok"): 1,
        ("/generate", "", "invalid"): 1,
        (GENERATIONS, "", "invalid"): 1,
        (HYPERBOLIC, "", "invalid"): 1,
        (GENERATIONS, "", "unauthorized"): 3,
        (GENERATIONS, MODEL, "rejected"): traffic.refused,
        (GENERATIONS, MODEL, "cancelled"): traffic.left,
    }
    for endpoint, outcome in {(endpoint, outcome) for endpoint, _, outcome in counted}:
        requests = sum(n for (at, _, how), n in counted.items() if (at, how) == (endpoint, outcome))
        name = "hypergen_request_seconds_count"
        assert total(traffic.client, name, endpoint=endpoint, outcome=outcome) == requests
    assert total(traffic.client, "hypergen_rejected_total", reason="rate_limit_exceeded") == traffic.refused


def test_images_steps_and_batches_are_counted(traffic: Traffic) -> None:
    client = traffic.client
    assert total(client, "hypergen_images_total") == 8
    assert traffic.steps == 2 * 2 + 3 + 5 + 2  # two images, three of one step, Hyperbolic's, job and item
    assert 2 + 3 + 5 + 2 <= traffic.forwards <= traffic.steps  # the two images may share theirs
    assert total(client, "hypergen_batch_images_sum") == total(client, "hypergen_denoising_steps_total")
    rows, images = total(client, "hypergen_batch_rows_sum"), total(client, "hypergen_batch_images_sum")
    assert images < rows <= 2 * images + total(client, "hypergen_batch_rows_count")
    (first,) = [
        sample
        for sample in samples_of(client, "hypergen_batch_images_bucket")
        if sample.labels["le"] == "2.0"
    ]
    assert first.value >= traffic.forwards


def test_stages_are_timed_per_request_or_image(traffic: Traffic) -> None:
    name = "hypergen_stage_seconds_count"
    counts = {stage: total(traffic.client, name, stage=stage) for stage in LABELS["stage_seconds"]["stage"]}
    assert counts == {"queue": 7, "encode": 7, "denoise": 7, "decode": 8, "write": 8}
    seconds = sum(s.value for s in samples_of(traffic.client, "hypergen_stage_seconds_sum"))
    assert 0 < seconds < 60


def test_the_end_of_a_job_is_a_log_line(traffic: Traffic) -> None:
    (line,) = [each for each in json_lines(traffic.server) if each["message"].startswith("Job ")]
    assert line["message"].endswith(" succeeded")
    assert line["model"] == MODEL
    assert line["ms"] >= 0


def test_the_price_counts_the_images_of_every_dialect(traffic: Traffic) -> None:
    image_with_one_step = 0.01 * (128 / 1024) ** 2 / 25
    steps = 2 * 2 + 3 + 5 + 2
    assert total(traffic.client, "hypergen_price_total", model=MODEL) == pytest.approx(
        image_with_one_step * steps
    )


def test_every_metric_has_series_and_no_other_labels(traffic: Traffic) -> None:
    wait_for(traffic.client, "hypergen_lora_loaded", lambda value: value == 1)
    wait_for(traffic.client, "hypergen_cache_hits_total", lambda value: value > 0, cache="lora")
    found: dict[str, list[dict[str, str]]] = {}
    for sample in samples_of(traffic.client):
        name = re.sub(r"_(bucket|sum|count)$", "", sample.name.removeprefix("hypergen_"))
        found.setdefault(name, []).append(sample.labels)
    assert set(found) == set(LABELS)
    for name, series in found.items():
        for labels in series:
            given = {label: value for label, value in labels.items() if label != "le"}
            assert set(given) == set(LABELS[name]), name
            for label, value in given.items():
                assert value in LABELS[name][label] or not LABELS[name][label], (name, label, value)


def test_caches_and_memory_are_reported(traffic: Traffic) -> None:
    client = traffic.client
    # Two requests named the LoRA; the prompt is new with it, and known for all but the first without it.
    wait_for(client, "hypergen_cache_hits_total", lambda value: value == 1, cache="lora")
    assert total(client, "hypergen_cache_misses_total", cache="lora") == 1
    assert total(client, "hypergen_cache_hits_total", cache="prompt") >= 4
    assert total(client, "hypergen_cache_misses_total", cache="prompt") >= 2
    assert 1e8 < total(client, "hypergen_device_memory_bytes", kind="resident") < 1e11
    assert total(client, "hypergen_models_in_memory") == 1
    assert 0 < total(client, "hypergen_model_load_seconds") < 60
    assert total(client, "hypergen_state", state="ready") == total(client, "hypergen_state") == 1
    assert total(client, "hypergen_build_info") == 1


def test_a_restart_of_the_engine_is_counted_and_no_counter_falls(traffic: Traffic) -> None:
    client = traffic.client
    before = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for sample in samples_of(client)
        if sample.name.endswith(("_total", "_count"))
    }
    traffic.server.engine().kill()
    wait_for(client, "hypergen_engine_up", lambda value: value == 0)
    assert total(client, "hypergen_state", state="recovering") == 1
    assert total(client, "hypergen_engine_restarts_total") == 1
    wait_for(client, "hypergen_engine_up", lambda value: value == 1)
    assert client.post(GENERATIONS, json={**QUICK, "prompt": "another"}).status_code == 200
    misses = "hypergen_cache_misses_total"
    known = before[misses, ("cache", "prompt"), ("engine", "0")]
    wait_for(client, misses, lambda value: value > known, cache="prompt")
    after = {(sample.name, *sorted(sample.labels.items())): sample.value for sample in samples_of(client)}
    assert [key for key, value in before.items() if after[key] < value] == []
    assert total(client, "hypergen_images_total") == 9


def test_a_second_server_of_the_same_user_has_its_own_metrics(
    traffic: Traffic, tmp_path: Path, sd_folder: Path
) -> None:
    """The second one also trusts the proxy of its clients, and logs at debug level."""
    images = total(traffic.client, "hypergen_images_total")
    home = traffic.server.log_file.parent / "bentoml"
    temporary = home.parents[1] / "temporary"
    folders = set(temporary.glob("hypergen-metrics-*"))
    assert len(folders) == 1
    environment = {"BENTOML_HOME": str(home), "TMPDIR": str(temporary), "HYPERGEN_LOG_LEVEL": "debug"}
    arguments = (str(sd_folder), "--device", "cpu", "--trusted-proxy", "127.0.0.1")
    with start_server(tmp_path, *arguments, environment=environment) as second:
        assert len(set(temporary.glob("hypergen-metrics-*"))) == 2
        proxied = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
        with client_of(second, **proxied) as client:
            assert total(client, "hypergen_images_total") == 0
            response = client.post(GENERATIONS, json={**QUICK, "response_format": "url"})
            assert response.json()["data"][0]["url"].startswith("https://127.0.0.1:")
            assert total(client, "hypergen_images_total") == 1
            line = logged(second, response.headers["x-request-id"])
            assert text_fields(line)["client"] == "203.0.113.9"
            probe = client.get("/livez")
            assert "DEBUG GET /livez 200 " in logged(second, probe.headers["x-request-id"])
            with ThreadPoolExecutor(1) as clients:
                body = {**QUICK, "num_inference_steps": 60, "n": 4}
                last = clients.submit(client.post, GENERATIONS, json=body)
                second.wait_until_running()
                second.process.send_signal(signal.SIGTERM)
                assert last.result().status_code == 200
        assert second.process.wait(60) == 0
        assert " INFO Draining 1 requests, for at most 60 s." in second.log()
        assert " INFO Drained: 1 finished." in second.log()
    assert set(temporary.glob("hypergen-metrics-*")) == folders
    assert total(traffic.client, "hypergen_images_total") == images
    own = json_lines(traffic.server)
    assert {line.get("client") for line in own} <= {None, "127.0.0.1"}
