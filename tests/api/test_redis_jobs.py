"""Jobs that replicas share in Redis. The replicas of these tests share one real engine."""

from __future__ import annotations

import asyncio
import base64
import json
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from hypergen.api.dialects.endpoint import Endpoint
from hypergen.api.dialects.endpoints import EDITS, GENERATIONS
from hypergen.api.job_store import JobState, JobStatus
from hypergen.api.redis_jobs.connection import connect
from hypergen.api.redis_jobs.job_queue import JobQueue
from hypergen.api.redis_jobs.redis_jobs import RedisJobs
from hypergen.api.redis_jobs.worker import MAX_DELIVERIES
from hypergen.api.request_record import RequestRecord
from hypergen.config import Settings
from hypergen.engine_client.accelerators import Accelerator
from hypergen.engine_client.pool import EnginePool
from hypergen.engine_protocol import generate_all
from hypergen.errors import (
    InvalidRequestError,
    NotFoundError,
    QueueFullError,
    StorageFullError,
    UnavailableError,
)
from hypergen.images.folder_storage import FolderStorage
from hypergen.images.storage import ImageStorage
from hypergen.request import ANONYMOUS, ApiKey
from tests.support.http_client import QUICK, SLOW
from tests.support.image_files import as_file, gradient
from tests.support.redis_server import RedisServer, start_redis
from tests.support.sync_engine import make_settings, served_model

pytestmark = pytest.mark.asyncio(loop_scope="module")
SETTINGS = Settings.model_validate({"engine": make_settings(max_batch_size=2), "server": {"max_jobs": 4}})


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with start_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool(sd_folder: Path) -> AsyncIterator[EnginePool]:
    pool = EnginePool(SETTINGS, accelerators=[Accelerator()])
    await pool.start([served_model(sd_folder)])
    async with asyncio.timeout(120):
        while pool.status().state != "ready":  # noqa: ASYNC110  the state changes in another process
            await asyncio.sleep(0.02)
    yield pool
    await pool.stop()


class Fleet:
    """Replicas that share one engine pool."""

    def __init__(self, redis: RedisServer, pool: EnginePool, storage: ImageStorage) -> None:
        self.redis, self.pool, self.storage = redis, pool, storage
        self._replicas: list[RedisJobs] = []

    def replica(self) -> RedisJobs:
        """A replica that runs no jobs before its `start`."""
        self._replicas.append(RedisJobs(connect(self.redis.url), SETTINGS, self.pool, self.storage))
        return self._replicas[-1]

    async def close(self) -> None:
        await asyncio.gather(*(replica.close() for replica in self._replicas))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[RedisJobs]:
        """A replica that runs jobs."""
        replica = self.replica()
        await replica.start()
        try:
            yield replica
        finally:
            await replica.close()

    async def submit(
        self,
        replica: RedisJobs,
        body: dict[str, Any],
        endpoint: Endpoint = GENERATIONS,
        api_key: ApiKey = ANONYMOUS,
        deadline_s: float = 60,
        **changes: Any,
    ) -> JobStatus:
        model_info = self.pool.model_info()
        assert model_info
        validated = endpoint.to_request(dict(body), model_info, SETTINGS.server, "req_1").of_request(
            api_key, ()
        )
        if changes:
            generation = replace(validated.generation, **changes)
            validated = replace(validated, generation=generation)
        record = RequestRecord("req_1", "POST", "/v1/images/jobs", None)
        return await replica.submit(
            endpoint, validated, record, asyncio.get_running_loop().time() + deadline_s
        )


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(
    redis: RedisServer, pool: EnginePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Fleet]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("hypergen.api.redis_jobs.worker.SILENT_S", 1.0)
    monkeypatch.setattr("hypergen.api.redis_jobs.worker._BEAT_S", 0.05)
    monkeypatch.setattr("hypergen.api.redis_jobs.worker._TAKE_OVER_EVERY_S", 0.2)
    with redis.client() as client:
        client.flushall()
    storage = FolderStorage(60, 1_000_000)
    fleet = Fleet(redis, pool, storage)
    yield fleet
    await fleet.close()
    storage.close()
    await wait_for_idle(pool)


async def wait_for_idle(pool: EnginePool) -> None:
    async with asyncio.timeout(60):
        while pool.status().queue_size:  # noqa: ASYNC110  the state changes in another process
            await asyncio.sleep(0.02)


async def wait(replica: RedisJobs, job: JobStatus, *states: JobState) -> JobStatus:
    async with asyncio.timeout(60):
        while (status := await replica.get(job.id)).state not in states:  # noqa: ASYNC110  it is in Redis
            await asyncio.sleep(0.02)
    return status


async def result_of(replica: RedisJobs, job: JobStatus, base: str | None = None) -> dict[str, Any]:
    return json.loads(b"".join(await replica.result(job, base)))


async def test_every_replica_answers_with_the_bytes_of_the_direct_request(fleet: Fleet) -> None:
    image = "data:image/png;base64," + base64.b64encode(as_file(gradient(64, 64))).decode()
    bodies = [
        (GENERATIONS, {**QUICK, "seed": 3, "n": 2}),
        (EDITS, {**QUICK, "num_inference_steps": 4, "seed": 3, "images": [{"image_url": image}]}),
    ]
    model_info = fleet.pool.model_info()
    assert model_info
    async with fleet.running(), fleet.running():
        other = fleet.replica()
        for endpoint, body in bodies:
            job = await fleet.submit(other, body, endpoint)
            assert (job.state, job.id[:4]) == ("queued", "job_")
            done = await wait(other, job, "succeeded", "failed")
            assert done.state == "succeeded", done.error
            assert done.body()["progress"]["step"] == done.body()["progress"]["steps"]
            validated = endpoint.to_request(dict(body), model_info, SETTINGS.server, "direct")
            direct = await generate_all(fleet.pool, validated.generation)
            result = await result_of(other, done, "https://x/")
            files = [base64.b64decode(item["b64_json"]) for item in result["data"]]
            assert files == [image.data for image in direct]
            stored = [
                await fleet.storage.read(item["url"].removeprefix("https://x/")) for item in result["data"]
            ]
            assert stored == files
            assert await result_of(other, done, "https://x/") == result  # the same files


async def test_a_full_storage_leaves_out_the_url(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    async with fleet.running() as replica:
        both = await fleet.submit(replica, QUICK)
        url = await fleet.submit(replica, {**QUICK, "response_format": "url"})
        done = [await wait(replica, job, "succeeded", "failed") for job in (both, url)]
        monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
        item = (await result_of(replica, done[0], "https://x/"))["data"][0]
        assert item["b64_json"]
        assert "url" not in item
        with pytest.raises(StorageFullError):
            await replica.result(done[1], "https://x/")


async def test_cancel_and_progress_work_from_every_replica(fleet: Fleet) -> None:
    async with fleet.running() as runs_it:
        other = fleet.replica()
        job = await fleet.submit(other, SLOW)
        waiting = [await fleet.submit(other, SLOW) for _ in range(2)]
        running = await wait(other, job, "running")
        assert "position" not in running.body()
        assert (await other.get(waiting[1].id)).position is not None
        async with asyncio.timeout(30):
            while not (status := await other.get(job.id)).step:  # noqa: ASYNC110  it is in Redis
                await asyncio.sleep(0.05)
        assert status.expected_s is not None
        assert 0 < status.step < (status.steps or 0)
        cancelled = await other.cancel(job.id)
        assert cancelled.state == "cancelled"
        for each in waiting:
            await runs_it.cancel(each.id)
        await wait_for_idle(fleet.pool)  # the replica that ran it stopped
        assert (await runs_it.cancel(job.id)).state == "cancelled"


async def test_the_jobs_of_a_killed_replica_are_finished_with_the_same_bytes(fleet: Fleet) -> None:
    body = {**SLOW, "n": 2}  # without a seed
    killed = fleet.replica()
    await killed.start()
    job = await fleet.submit(killed, body)
    await wait(killed, job, "running")
    for task in (*killed._worker._tasks, *(run.task for run in killed._worker._runs.values())):
        assert task
        task.cancel()
    await wait_for_idle(fleet.pool)
    with fleet.redis.client() as client:
        seed = json.loads(client.hget(f"hypergen:job:{job.id}", "request") or "")["generation"]["seed"]
    async with fleet.running() as other:
        done = await wait(other, job, "succeeded", "failed")
        item = (await result_of(other, done))["data"][1]
        again = await fleet.submit(other, {**body, "seed": seed})
        expected = (await result_of(other, await wait(other, again, "succeeded")))["data"][1]
    assert (item["seed"], item["b64_json"]) == (seed + 1, expected["b64_json"])


async def test_a_replica_that_stops_leaves_its_jobs_to_others_at_once(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet.running() as first:
        job = await fleet.submit(first, {**SLOW, "n": 1})
        await wait(first, job, "running")
    other = fleet.replica()
    assert (await other.get(job.id)).state == "queued"
    queue: JobQueue = other._queue
    assert [entry.job_id for entry in await queue.take_over(9, silent_s=3600)] == [job.id]
    await other.cancel(job.id)


async def test_a_job_that_kills_replicas_fails_in_the_end(fleet: Fleet) -> None:
    other = fleet.replica()
    job = await fleet.submit(other, QUICK)
    await other._queue.create_group()
    (entry,) = await other._queue.read(1, 0.1)
    for _ in range(MAX_DELIVERIES):
        await other._queue.take(entry)  # by a replica that ends before its next heartbeat
    async with fleet.running():
        failed = await wait(other, job, "succeeded", "failed")
    assert failed.error
    assert (failed.state, failed.error.code) == ("failed", "poison")


async def test_a_job_for_a_model_that_nobody_serves_fails_in_the_end(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hypergen.api.redis_jobs.worker.SILENT_S", 0.1)
    async with fleet.running() as replica:
        job = await fleet.submit(replica, QUICK, model="gone")
        served = await fleet.submit(replica, QUICK)
        assert (await wait(replica, served, "succeeded", "failed")).state == "succeeded"
        failed = await wait(replica, job, "succeeded", "failed")
    assert failed.error
    assert (failed.state, failed.error.code) == ("failed", "model_not_found")
    assert "'gone'" in failed.error.message


async def test_a_job_that_is_late_fails(fleet: Fleet) -> None:
    async with fleet.running() as replica:
        slow = await fleet.submit(replica, SLOW, deadline_s=1)
        failed = await wait(replica, slow, "succeeded", "failed")
    assert failed.error
    assert failed.error.code == "timeout"


async def test_an_error_of_the_engine_names_the_field_of_the_dialect(fleet: Fleet) -> None:
    async with fleet.running() as replica:
        job = await fleet.submit(replica, QUICK, sampler="unknown")
        failed = await wait(replica, job, "succeeded", "failed")
    assert failed.state == "failed"
    assert failed.body()["error"]["status"] >= 400


async def test_more_jobs_than_the_fleet_keeps_are_rejected(fleet: Fleet) -> None:
    replica = fleet.replica()
    jobs = [await fleet.submit(replica, SLOW) for _ in range(4)]
    assert [(await replica.get(job.id)).position for job in jobs] == [0, 1, 2, 3]
    with pytest.raises(QueueFullError, match="4 unfinished jobs"):
        await fleet.submit(replica, SLOW)
    key = ApiKey("team", images_per_minute=1)
    with pytest.raises(InvalidRequestError, match="1 images per minute"):
        await fleet.submit(replica, {**QUICK, "n": 2}, api_key=key)
    await replica.cancel(jobs[0].id)
    await fleet.submit(replica, QUICK, api_key=key)
    with pytest.raises(NotFoundError):
        await replica.get(jobs[0].id)  # removed for the new one
    await replica.cancel(jobs[1].id)
    with pytest.raises(QueueFullError, match="images per minute"):
        await fleet.submit(replica, QUICK, api_key=key)


async def test_while_redis_is_away_running_jobs_go_on_and_their_results_are_kept(fleet: Fleet) -> None:
    async with fleet.running() as replica:
        job = await fleet.submit(replica, {**SLOW, "n": 2})
        await wait(replica, job, "running")
        fleet.redis.kill()
        try:
            for call in (fleet.submit(replica, QUICK), replica.get(job.id), replica.cancel(job.id)):
                with pytest.raises(UnavailableError) as caught:
                    await call
                assert caught.value.code == "jobs_unavailable"
            await wait_for_idle(fleet.pool)  # it was generated meanwhile
        finally:
            fleet.redis.start()
        done = await wait(replica, job, "succeeded", "failed")
        assert (await result_of(replica, done))["data"]
        with fleet.redis.client() as client:
            assert client.hget(f"hypergen:job:{job.id}", "deliveries") == b"1"
        next_one = await fleet.submit(replica, QUICK)
        assert (await wait(replica, next_one, "succeeded", "failed")).state == "succeeded"
