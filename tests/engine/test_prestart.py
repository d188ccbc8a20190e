"""A prestarted engine process: attached to once, restarted after a crash, stopped with its launcher."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hypergen.config import Settings
from hypergen.engine_client.accelerators import Accelerator
from hypergen.engine_client.pool import EnginePool
from hypergen.engine_client.prestart import VARIABLE, PrestartedEngine, attach
from hypergen.engine_protocol import generate_all
from tests.support.sync_engine import make_request, make_settings, served_model


async def _until_ready(pool: EnginePool) -> None:
    async with asyncio.timeout(60):
        while pool.status().state != "ready":  # noqa: ASYNC110  it happens in another process
            await asyncio.sleep(0.02)


async def test_the_pool_attaches_to_a_prestarted_engine_and_restarts_it_after_a_crash(
    sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prestarted = PrestartedEngine(sd_folder)
    monkeypatch.setenv(VARIABLE, prestarted.environment[VARIABLE])
    engine_pid = int(prestarted.environment[VARIABLE].partition(":")[0])
    pool = EnginePool(Settings.model_validate({"engine": make_settings()}), accelerators=[Accelerator()])
    try:
        await pool.start([served_model(sd_folder)])
        assert pool.engine_pids() == [engine_pid]
        assert not os.path.exists(prestarted.environment[VARIABLE].partition(":")[2])  # noqa: ASYNC240
        await _until_ready(pool)
        (before,) = await generate_all(pool, make_request())
        os.kill(engine_pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            while pool.engine_pids() == [engine_pid]:  # noqa: ASYNC110  it happens in another process
                await asyncio.sleep(0.02)
        await _until_ready(pool)
        (after,) = await generate_all(pool, make_request())
        assert after.data == before.data
    finally:
        await pool.stop()
        prestarted.close()
    assert not psutil.pid_exists(engine_pid)


def test_a_prestarted_engine_exits_with_its_launcher(sd_folder: Path) -> None:
    code = "import sys, pathlib; from hypergen.engine_client.prestart import PrestartedEngine\n"
    code += "print(PrestartedEngine(pathlib.Path(sys.argv[1])).environment, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(sd_folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as launcher:
        assert launcher.stdout is not None
        printed = launcher.stdout.readline().decode()
        folder = Path(printed.split("'")[3].partition(":")[2]).parent
        assert folder.is_dir()
        (prestarted,) = psutil.Process(launcher.pid).children()
        assert prestarted.is_running()
        launcher.kill()
    prestarted.wait(10)
    assert not folder.exists()


def test_an_exited_prestarted_engine_is_not_attached_to(
    sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert attach() is None
    prestarted = PrestartedEngine(sd_folder)
    monkeypatch.setenv(VARIABLE, prestarted.environment[VARIABLE])
    prestarted.close()
    pid = int(prestarted.environment[VARIABLE].partition(":")[0])
    until = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < until:
        time.sleep(0.01)
    assert attach() is None
    assert VARIABLE not in os.environ
