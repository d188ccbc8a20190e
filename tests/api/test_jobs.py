"""Asynchronous jobs: /v1/images/jobs."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message, Scope

from hypergen.api.dialects import endpoints
from hypergen.api.jobs import MemoryJobs
from hypergen.api.request_record import RequestRecord
from hypergen.api.routes import StoredFile
from hypergen.api.validated_request import ValidatedRequest
from hypergen.config import Settings
from hypergen.engine_client.accelerators import Accelerator
from hypergen.engine_client.pool import EnginePool
from hypergen.errors import NotFoundError, QueueFullError, UnavailableError
from hypergen.images.folder_storage import FolderStorage
from tests.api.conftest import TightServer
from tests.support.http_client import QUICK, SLOW, assert_error, generate
from tests.support.live_server import LiveServer
from tests.support.sync_engine import make_request

PATH = "/v1/images/jobs"
HYPERBOLIC = {"model_name": "SD1.5", "prompt": "a red circle", "steps": 1}


def submit(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post(PATH, json=body)
    assert response.status_code == 202, response.text
    assert response.headers["location"] == f"{PATH}/{response.json()['id']}"
    return response.json()


def wait(
    client: httpx.Client, job: dict[str, Any], until: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    """All status bodies of the job until the condition holds."""
    bodies: list[dict[str, Any]] = []
    deadline = time.monotonic() + 60
    while not bodies or not until(bodies[-1]):
        assert time.monotonic() < deadline, bodies[-1:]
        response = client.get(f"{PATH}/{job['id']}")
        assert response.status_code == 200, response.text
        bodies.append(response.json())
        time.sleep(0.01)
    return bodies


def ended(job: dict[str, Any]) -> bool:
    return job["status"] in ("succeeded", "failed", "cancelled")


def running(job: dict[str, Any]) -> bool:
    return "progress" in job


def test_a_job_has_the_result_of_the_direct_request(client: httpx.Client) -> None:
    fields = {**QUICK, "seed": 3, "n": 2, "output_format": "webp"}
    job = submit(client, **fields)
    assert set(job) >= {"id", "object", "status", "created"}
    assert (job["object"], job["id"][:4]) == ("image.job", "job_")
    done = wait(client, job, ended)[-1]
    assert done["status"] == "succeeded"
    assert done["progress"] == {"step": 2, "steps": 2}
    direct = generate(client, **fields)
    result = done["result"]
    assert set(result) == set(direct)
    assert [(item["b64_json"], item["seed"]) for item in result["data"]] == [
        (item["b64_json"], item["seed"]) for item in direct["data"]
    ]
    assert httpx.get(result["data"][1]["url"]).headers["content-type"] == "image/webp"


def test_hyperbolics_bodies_get_hyperbolics_responses(client: httpx.Client) -> None:
    done = wait(client, submit(client, **HYPERBOLIC, seed=3), ended)[-1]
    direct = client.post("/v1/image/generation", json={**HYPERBOLIC, "seed": 3}).json()
    assert set(done["result"]) == {"images", "inference_time"}
    assert done["result"]["images"] == direct["images"]


def test_progress_increases_and_the_remaining_time_is_estimated(client: httpx.Client) -> None:
    bodies = wait(client, submit(client, **{**QUICK, "num_inference_steps": 40}), ended)
    steps = [job["progress"]["step"] for job in bodies if running(job)]
    assert len(set(steps)) > 2
    assert steps == sorted(steps)
    assert {job["progress"]["steps"] for job in bodies if running(job)} == {40}
    expected = [job["expected_s"] for job in bodies if job["status"] == "running" and "expected_s" in job]
    assert expected
    assert min(expected) >= 0
    assert "expected_s" not in bodies[-1]


def test_delete_cancels_a_job_and_frees_the_engine(client: httpx.Client) -> None:
    job = submit(client, **SLOW)
    wait(client, job, running)
    response = client.delete(f"{PATH}/{job['id']}")
    assert (response.status_code, response.json()["status"]) == (200, "cancelled")
    assert client.get("/health").json()["queue_size"] == 0
    again = client.delete(f"{PATH}/{job['id']}").json()
    assert again["status"] == client.get(f"{PATH}/{job['id']}").json()["status"] == "cancelled"


def test_a_job_that_exceeds_its_deadline_fails(tight: TightServer) -> None:
    with httpx.Client(base_url=tight.server.url, timeout=60) as client:
        first = submit(client, **SLOW)
        wait(client, first, running)
        bodies = wait(client, first, ended)
    assert bodies[-1]["status"] == "failed"
    assert (bodies[-1]["error"]["status"], bodies[-1]["error"]["code"]) == (504, "timeout")
    assert "result" not in bodies[-1]


def test_a_full_queue_rejects_jobs_at_once(tight: TightServer) -> None:
    responses = [tight.client.post(PATH, json=SLOW) for _ in range(4)]
    rejected = [response for response in responses if response.status_code == 429]
    assert rejected
    for response in rejected:
        assert_error(response, 429, code="rate_limit_exceeded")
        assert 1 <= int(response.headers["retry-after"]) <= 60
    for response in responses:
        if response.status_code == 202:
            tight.client.delete(response.headers["location"])
    assert tight.client.get("/health").json()["queue_size"] == 0


def test_beyond_the_limit_the_job_that_ended_first_is_removed(tight: TightServer) -> None:
    jobs = []
    for _ in range(4):
        jobs.append(submit(tight.client, **QUICK))
        wait(tight.client, jobs[-1], ended)
    assert_error(tight.client.get(f"{PATH}/{jobs[0]['id']}"), 404, code="not_found")
    for job in jobs[1:]:
        assert tight.client.get(f"{PATH}/{job['id']}").json()["status"] == "succeeded"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({**QUICK, "n": 11}, "n"),
        ({"num_inference_steps": 1}, "prompt"),
        ({**HYPERBOLIC, "steps": 101}, "steps"),
        ({"prompt": "a", "images": []}, "images"),
        ({"prompt": "a", "images": [{"image_url": "https://example.com/x.png"}]}, "images"),
    ],
)
def test_invalid_bodies_create_no_job(client: httpx.Client, body: dict[str, Any], param: str) -> None:
    assert_error(client.post(PATH, json=body), 400, param=param)


def test_invalid_forms_create_no_job(client: httpx.Client) -> None:
    for data in ({}, {"prompt": "a"}):
        files = {"image": ("upload", b"not an image")}
        assert_error(client.post(PATH, data=data, files=files), 400, param="image")


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("name", ["job_0", "x", "%2e%2e", "a" * 5000])
def test_unknown_jobs_are_not_found(client: httpx.Client, method: str, name: str) -> None:
    assert_error(client.request(method, f"{PATH}/{name}"), 404, code="not_found")


def test_jobs_need_the_key(keyed_server: LiveServer) -> None:
    with httpx.Client(base_url=keyed_server.url) as client_without_key:
        assert_error(client_without_key.post(PATH, json=QUICK), 401)
        assert_error(client_without_key.get(f"{PATH}/job_0"), 401)
        assert_error(client_without_key.delete(f"{PATH}/job_0"), 401)


async def test_concurrent_jobs_are_all_rejected() -> None:
    """At most one job is kept, and each that ends makes space for the next during its rejection."""
    settings = Settings.model_validate({})
    pool = EnginePool(settings, accelerators=[Accelerator()])  # not started: it rejects at once
    jobs = MemoryJobs(pool, FolderStorage(60, 1000), lifetime_s=60, max_jobs=1)
    request, record = make_request(), RequestRecord("req_1", "POST", PATH, None)
    errors = await asyncio.gather(
        *(
            jobs.submit(endpoints.GENERATIONS, ValidatedRequest(request), record, deadline=1e9)
            for _ in range(8)
        ),
        return_exceptions=True,
    )
    assert {type(error) for error in errors} <= {UnavailableError, QueueFullError}


async def test_an_image_that_expires_during_its_read_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    storage = FolderStorage(60, 1_000_000)
    name = await storage.put(b"data", "png", "image/png")
    stored = storage.get(name)
    assert stored
    monkeypatch.setattr(storage, "get", lambda _: stored)  # it existed at the look-up
    stored.path.unlink()
    assert await storage.read(name) is None
    storage.close()


async def test_an_image_that_expires_before_its_first_byte_is_not_found(tmp_path: Path) -> None:
    """Removed before its size is read, and between that and its opening."""
    sent: list[Message] = []

    async def receive() -> Message:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "http", "method": "GET", "headers": [], "asgi": {"spec_version": "2.3"}}
    file = tmp_path / "x.png"
    for known in (None, os.stat(tmp_path)):
        with pytest.raises(NotFoundError):
            await StoredFile(file, stat_result=known)(scope, receive, send)
    assert sent == []
