"""A spare engine process: adopted once, replaced when it dies, gone with its launcher."""

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
from hypergen.engine_client.pool import EnginePool
from hypergen.engine_client.prestart import VARIABLE, Spare, adopt
from hypergen.engine_protocol import generate_all
from tests.support.sync_engine import make_request, make_settings, served


async def _until_ready(pool: EnginePool) -> None:
    async with asyncio.timeout(60):
        while pool.status().state != "ready":  # noqa: ASYNC110  the same
            await asyncio.sleep(0.02)


async def test_the_pool_adopts_a_spare_and_replaces_it_when_it_dies(
    sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare = Spare(sd_folder)
    monkeypatch.setenv(VARIABLE, spare.environment[VARIABLE])
    spare_pid = int(spare.environment[VARIABLE].partition(":")[0])
    pool = EnginePool(Settings.model_validate({"engine": make_settings()}), accelerators=[{}])
    try:
        await pool.start([served(sd_folder)])
        assert pool.engine_pids() == [spare_pid]
        assert not os.path.exists(spare.environment[VARIABLE].partition(":")[2])  # noqa: ASYNC240
        await _until_ready(pool)
        (before,) = await generate_all(pool, make_request())
        os.kill(spare_pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            while pool.engine_pids() == [spare_pid]:  # noqa: ASYNC110  it happens in another process
                await asyncio.sleep(0.02)
        await _until_ready(pool)
        (after,) = await generate_all(pool, make_request())
        assert after.data == before.data
    finally:
        await pool.stop()
        spare.close()
    assert not psutil.pid_exists(spare_pid)


def test_a_spare_leaves_with_its_launcher(sd_folder: Path) -> None:
    code = "import sys, pathlib; from hypergen.engine_client.prestart import Spare\n"
    code += "print(Spare(pathlib.Path(sys.argv[1])).environment, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(sd_folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as launcher:
        assert launcher.stdout is not None
        launcher.stdout.readline()
        (spare,) = psutil.Process(launcher.pid).children()
        assert spare.is_running()
        launcher.kill()
    spare.wait(10)


def test_a_spare_that_is_gone_is_not_adopted(sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert adopt() is None
    spare = Spare(sd_folder)
    monkeypatch.setenv(VARIABLE, spare.environment[VARIABLE])
    spare.close()
    pid = int(spare.environment[VARIABLE].partition(":")[0])
    until = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < until:
        time.sleep(0.01)
    assert adopt() is None
    assert VARIABLE not in os.environ
