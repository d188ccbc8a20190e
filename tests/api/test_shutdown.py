"""Responses and clean-up of a server that is stopped or killed."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from hypergen.api.dialects.endpoints import GENERATIONS
from hypergen.api.jobs import MemoryJobs
from hypergen.api.request_record import RequestRecord
from hypergen.app import create_app
from hypergen.config import Settings
from hypergen.engine_client.accelerators import Accelerator
from hypergen.engine_client.pool import EnginePool
from hypergen.images.folder_storage import FolderStorage
from hypergen.images.temporary_folders import create_and_lock, remove_folders_of_killed_servers
from tests.support.http_client import GENERATIONS as GENERATIONS_PATH
from tests.support.http_client import QUICK, SLOW, assert_error, generate
from tests.support.live_server import LiveServer, start_server
from tests.support.sync_engine import make_settings, served_model


def test_all_requests_get_503_at_the_end_of_a_drain(tmp_path: Path, sd_folder: Path) -> None:
    """One request runs, one waits, three are in the overflow queue; the drain time is 3 s."""
    arguments = (str(sd_folder), "--device", "cpu", "--max-queue-size", "1", "--drain-timeout", "3")
    body = {**SLOW, "size": "512x512"}
    with start_server(tmp_path, *arguments) as server, ThreadPoolExecutor(5) as clients:
        responses = [
            clients.submit(httpx.post, server.url + GENERATIONS_PATH, json=body, timeout=60) for _ in range(5)
        ]
        until = time.monotonic() + 60
        while server.health()["queue_size"] < 5:
            assert time.monotonic() < until
            time.sleep(0.05)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        for response in responses:
            assert_error(response.result(), 503, code="draining")
        assert 2.5 < time.monotonic() - started < 10
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.log()
        assert " INFO Draining 5 requests, for at most 3 s." in server.log()
        assert " INFO Drained: 5 failed (draining)." in server.log()


def _workers(server: LiveServer) -> list[psutil.Process]:
    """The HTTP processes; BentoML restarts a killed one."""
    return [p for p in server.processes() if any("_bentoml_impl" in argument for argument in p.cmdline())]


def test_images_of_a_killed_worker_are_removed_at_the_next_start(tmp_path: Path, sd_folder: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {"TMPDIR": str(temporary)}
    with start_server(
        tmp_path / "server", str(sd_folder), "--device", "cpu", environment=environment
    ) as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            generate(client)
        (left,) = temporary.glob("hypergen-images-*")
        (worker,) = _workers(server)
        worker.kill()
        until = time.monotonic() + 60
        while left.exists():
            assert time.monotonic() < until
            time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)
    assert not list(temporary.glob("hypergen-*"))


async def test_folders_of_running_servers_are_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    storage = FolderStorage(lifetime_s=60, max_bytes=1000)
    name = await storage.put(b"data", "png", "image/png")
    metrics = tmp_path / "hypergen-metrics-running"
    lock = create_and_lock(metrics)
    for kind in ("images", "metrics"):
        (tmp_path / f"hypergen-{kind}-killed").mkdir()
    os.mkfifo(tmp_path / "hypergen-images-trap")  # opening it would block for ever
    remove_folders_of_killed_servers()
    assert await storage.read(name) == b"data"
    assert metrics.is_dir()
    assert len(os.listdir(tmp_path)) == 3
    os.close(lock)
    remove_folders_of_killed_servers()
    assert not metrics.exists()
    storage.close()


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def test_expired_jobs_do_not_block_the_shutdown(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of the app's lifespan the storage is closed and running jobs are cancelled."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pool = EnginePool(Settings.model_validate({"engine": make_settings()}), accelerators=[Accelerator()])
    await pool.start([served_model(sd_folder)])
    try:
        async with asyncio.timeout(60):
            while pool.status().state != "ready":  # noqa: ASYNC110  the state changes in another process
                await asyncio.sleep(0.02)
        storage = FolderStorage(60, 1_000_000)
        jobs = MemoryJobs(pool, storage, lifetime_s=0.0, max_jobs=10)
        model_info = pool.model_info()
        assert model_info
        deadline = asyncio.get_running_loop().time() + 60

        async def submit(request_id: str, **fields: object) -> str:
            body = {**QUICK, **fields}
            validated = GENERATIONS.to_request(
                body, model_info, Settings.model_validate({}).server, request_id
            )
            record = RequestRecord(request_id, "POST", "/v1/images/jobs", None)
            return (await jobs.submit(GENERATIONS, validated, record, deadline)).id

        old = jobs.find(await submit("old"))
        assert old.task
        await old.task
        assert len(_files(tmp_path)) == 1
        running = jobs.find(await submit("running", **SLOW))
        await jobs.close()
        assert running.state == "cancelled"
        assert pool.status().queue_size == 0
        storage.close()
        assert _files(tmp_path) == []
    finally:
        await pool.stop()


async def test_the_storage_is_closed_if_closing_the_jobs_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    settings = Settings.model_validate({})
    app = create_app(settings, EnginePool(settings, accelerators=[Accelerator()]), [served_model(tmp_path)])
    closed = threading.Event()
    monkeypatch.setattr(FolderStorage, "close", lambda _: closed.set())

    async def fail(_: MemoryJobs) -> None:
        raise OSError("cannot be closed")

    monkeypatch.setattr(MemoryJobs, "close", fail)
    with pytest.raises(OSError, match="cannot be closed"):
        async with app.router.lifespan_context(app):
            pass
    assert closed.is_set()


async def test_expired_images_are_removed_without_a_new_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    storage = FolderStorage(lifetime_s=0.01, max_bytes=1000)
    await storage.put(b"data", "png", "image/png")
    await asyncio.sleep(0.02)
    storage.remove_expired()
    assert _files(tmp_path) == []
    storage.close()
