"""The BentoML service: its declaration, its batchable API, and its processes."""

from __future__ import annotations

import base64
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import bentoml
import httpx
import psutil
import pytest

from tests.support.live_server import LiveServer, copy_imported, free_port, start_server
from tests.support.log_lines import logged

ROOT = Path(__file__).parents[1]
ITEM = {"prompt": "a cat", "seed": 1, "num_inference_steps": 4, "size": "64x64"}


def generate(server: LiveServer, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=120)


def test_importing_the_service_imports_no_torch(tmp_path: Path, sd_folder: Path) -> None:
    environment = {**os.environ, "BENTOML_HOME": str(tmp_path), "HYPERGEN_MODELS": str(sd_folder)}
    code = 'import service, sys; assert "torch" not in sys.modules'
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system has no /proc")
def test_no_http_process_maps_libtorch_while_an_image_is_generated(server: LiveServer) -> None:
    body = {**ITEM, "num_inference_steps": 150, "n": 4}
    generating = threading.Thread(target=generate, args=(server, body))
    generating.start()
    server.wait_until_running()
    maps = {p.pid: Path(f"/proc/{p.pid}/maps").read_text() for p in server.processes()}
    assert server.health()["running"] == 1
    generating.join()
    mapping = {pid for pid, text in maps.items() if "libtorch" in text}
    assert mapping == {server.engine().pid}
    assert len(maps) >= 4  # hypergen serve, bentoml's main process, its worker, the engine


def test_the_batchable_api_generates_the_same_bytes_and_items_fail_independently(server: LiveServer) -> None:
    with bentoml.SyncHTTPClient(server.url) as client:
        good, bad, other = client.generate(items=[ITEM, {**ITEM, "n": 99}, {**ITEM, "seed": 2}])  # pyright: ignore
    assert (good["status"], bad["status"], other["status"]) == (200, 400, 200)
    assert bad["error"]["param"] == "n"
    expected = generate(server, {**ITEM, "response_format": "b64_json"}).json()["data"][0]["b64_json"]
    assert base64.b64decode(good["images"][0]["b64_json"]) == base64.b64decode(expected)
    assert good["images"][0]["seed"] == 1


def test_single_batchable_calls_do_not_wait_for_others(server: LiveServer) -> None:
    batchable: list[float] = []
    openai_route: list[float] = []
    body = {**ITEM, "response_format": "b64_json"}
    with bentoml.SyncHTTPClient(server.url) as client, httpx.Client() as http:
        for _ in range(10):  # alternating, so that other load on the machine affects both
            started = time.perf_counter()
            client.generate(items=[body])  # pyright: ignore[reportAttributeAccessIssue]  made from the schema
            between = time.perf_counter()
            http.post(f"{server.url}/v1/images/generations", json=body).raise_for_status()
            batchable.append(between - started)
            openai_route.append(time.perf_counter() - between)
    assert statistics.median(batchable) - statistics.median(openai_route) < 1


def test_batchable_calls_are_not_shed_and_their_batches_overlap(server: LiveServer) -> None:
    """40 calls are five times the maximum batch size; the stock dispatcher rejects most of them with 503."""
    finished: list[tuple[int, int]] = []

    with bentoml.SyncHTTPClient(server.url, timeout=120) as client:

        def call(number: int, steps: int) -> None:
            item = {**ITEM, "seed": number, "num_inference_steps": steps}
            (result,) = client.generate(items=[item])  # pyright: ignore[reportAttributeAccessIssue]
            finished.append((number, result["status"]))

        long = threading.Thread(target=call, args=(0, 150))
        long.start()
        server.wait_until_running()
        others = [threading.Thread(target=call, args=(number, 4)) for number in range(1, 40)]
        for thread in others:
            thread.start()
        for thread in [*others, long]:
            thread.join()
    assert Counter(status for _, status in finished) == {200: 40}
    assert finished[0][0] != 0  # a short call in a later batch ended before the long one of the first


def test_the_patched_internals_of_bentoml_exist() -> None:
    from bentoml._internal.marshal.dispatcher import CorkDispatcher, NonBlockSema

    dispatcher = CorkDispatcher(
        max_latency_in_ms=1, max_batch_size=2, fallback=RuntimeError, get_batch_size=len, batch_dim=(0, 0)
    )
    assert {"o_a", "o_b", "wait", "log_outbound", "trigger_refresh"} <= set(dir(dispatcher.optimizer))
    assert isinstance(dispatcher._sema, NonBlockSema)


def test_bentoml_serve_gives_the_same_responses(tmp_path: Path, server: LiveServer, sd_folder: Path) -> None:
    config = tmp_path / "small.yaml"
    copy_imported(str(sd_folder), tmp_path / "home")
    config.write_text(f"models: {sd_folder}\nengine: {{device: cpu, dtype: float32}}\n")
    port = free_port()
    environment = {**os.environ, "BENTOML_HOME": str(tmp_path / "home"), "HYPERGEN_CONFIG": str(config)}
    command = [sys.executable, "-m", "bentoml", "serve", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log, (tmp_path / "stdout").open("wb") as stdout:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=log)
    other = LiveServer(f"http://127.0.0.1:{port}", process, tmp_path / "log", None)
    try:
        until = time.monotonic() + 90
        while time.monotonic() < until:
            try:
                if other.health()["status"] == "healthy":
                    break
            except (httpx.HTTPError, ValueError):
                time.sleep(0.2)
        assert httpx.get(f"{other.url}/readyz").status_code == 200
        body = {**ITEM, "response_format": "b64_json"}
        assert generate(other, body).json()["data"] == generate(server, body).json()["data"]
        assert other.openai().models.list().data[0].id == server.openai().models.list().data[0].id
        assert f"INFO Ready: engine 1 of 1, {sd_folder} on cpu (" in logged(other, "Ready")
        assert (tmp_path / "stdout").read_bytes() == b""
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize("victim", ["hypergen serve", "bentoml serve"])
def test_killing_a_main_process_leaves_no_orphan(tmp_path: Path, sd_folder: Path, victim: str) -> None:
    with start_server(tmp_path, str(sd_folder), "--device", "cpu") as server:
        processes = server.processes()
        main = processes[0]
        target = (
            main if victim == "hypergen serve" else next(p for p in processes if "bentoml" in p.cmdline())
        )
        target.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs([p for p in processes if p.pid != main.pid], timeout=15)
        assert alive == []
        server.process.wait(15)


def test_a_second_signal_kills_all_processes(tmp_path: Path, sd_folder: Path) -> None:
    with start_server(tmp_path, str(sd_folder), "--device", "cpu") as server:
        body = {**ITEM, "num_inference_steps": 150, "n": 10, "size": "512x512"}

        def generate_until_killed() -> None:
            with pytest.raises(httpx.HTTPError):
                generate(server, body)

        generating = threading.Thread(target=generate_until_killed)
        generating.start()
        server.wait_until_running()
        processes = server.processes()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(15)
        _, alive = psutil.wait_procs([p for p in processes if p.pid != server.process.pid], timeout=15)
        assert alive == []
        generating.join(15)


def test_sigterm_lets_accepted_requests_finish(tmp_path: Path, sd_folder: Path) -> None:
    responses: list[httpx.Response] = []
    with start_server(tmp_path, str(sd_folder), "--device", "cpu") as server:
        body = {**ITEM, "num_inference_steps": 150, "response_format": "b64_json"}
        generating = threading.Thread(target=lambda: responses.append(generate(server, body)))
        generating.start()
        server.wait_until_running()
        server.process.send_signal(signal.SIGTERM)
        generating.join(60)
        assert [response.status_code for response in responses] == [200]
        assert server.process.wait(30) == 0
