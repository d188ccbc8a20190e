"""The threads of an engine process, and of the supervisor that watches it: none ends without a word."""

from __future__ import annotations

import asyncio
import os
import queue
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from hypergen import ipc
from hypergen.engine import worker_main
from hypergen.engine.model_manager import ModelManager
from hypergen.engine_client.engine_process import Supervisor
from hypergen.errors import unpack
from hypergen.events import EngineStatus, Preview, Started
from tests.support.sync_engine import make_request, served_model

_NO_PICKLE = (3).to_bytes(8, "big") + b"abc"


async def _lost(folder: Path, monkeypatch: pytest.MonkeyPatch, says: bytes, hears: Any) -> Supervisor:
    """The supervisor of a process that says this and is told that, as soon as it has lost it."""
    engine = folder / "engine"
    engine.write_text(
        f"#!{sys.executable}\nimport os, sys, time\nos.write(int(sys.argv[-1]), {says!r})\ntime.sleep(600)\n"
    )
    engine.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(engine))
    lost = asyncio.Event()
    supervisor = Supervisor(
        ipc.Start(()),
        {},
        on_ready=lambda _: None,
        on_message=lambda _: None,
        on_lost=lambda _: lost.set(),
    )
    supervisor.launch()
    supervisor.send(ipc.Submit(hears))
    async with asyncio.timeout(60):
        await lost.wait()
    return supervisor


@pytest.mark.parametrize("deaf", [True, False])
async def test_an_engine_that_cannot_be_talked_with_is_ended_and_counts_as_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaf: bool
) -> None:
    says, hears = (b"", threading.Lock()) if deaf else (_NO_PICKLE, make_request())
    supervisor = await _lost(tmp_path, monkeypatch, says, hears)
    assert supervisor.status.state == "failed"
    assert supervisor.pid is not None
    assert not psutil.pid_exists(supervisor.pid)


def test_an_engine_that_cannot_read_what_it_is_told_ends_with_code_13(sd_folder: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        arguments = ["-P", "-m", "hypergen.engine.worker_main", str(theirs.fileno())]
        with subprocess.Popen([sys.executable, *arguments], pass_fds=[theirs.fileno()]) as engine:
            try:
                ipc.send(ours, ipc.Start((served_model(sd_folder),)))
                ours.sendall(_NO_PICKLE)
                assert engine.wait(60) == 13
            finally:
                engine.kill()


def test_processes_that_an_engine_starts_do_not_inherit_its_connection() -> None:
    """Else one that lives on would hide the death of the engine."""
    theirs, ours = socket.socketpair()
    with theirs, ours:
        descriptor = os.dup(theirs.fileno())
        os.set_inheritable(descriptor, True)
        connection, _ = worker_main._connect([str(descriptor)])
        with connection:
            assert connection.get_inheritable() is False


def test_a_heart_beats_on_with_the_last_status_when_there_is_no_new_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager = ModelManager([], None, lambda *_: pytest.fail("no model"), lambda *_: None)
    del manager.startup_s  # what `status` tells
    known = EngineStatus(state="ready", forwards=7)
    outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    class Enough(BaseException):
        pass

    def after_three_beats(_seconds: float) -> None:
        if outbox.qsize() == 3:
            raise Enough

    monkeypatch.setattr(worker_main.time, "sleep", after_three_beats)
    with pytest.raises(Enough):
        worker_main._send_heartbeats(manager, known, outbox)
    assert [outbox.get().status for _ in range(3)] == [known] * 3
    assert caplog.text.count("The status cannot be told") == 1


def test_an_event_that_cannot_be_sent_fails_its_request_and_no_other() -> None:
    ours, theirs = socket.socketpair()
    outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    unpicklable: Any = threading.Lock()
    outbox.put(ipc.EventMessage("bad", Preview(index=0, number=0, data=unpicklable)))
    outbox.put(ipc.EventMessage("good", Started()))
    writer = threading.Thread(target=worker_main._write, args=(theirs, outbox), daemon=True)
    with ours:
        ours.settimeout(30)
        writer.start()
        assert ipc.receive(ours) == ipc.EventMessage("good", Started())
        failed = ipc.receive(ours)
    assert isinstance(failed, ipc.Failed)
    assert failed.request_id == "bad"
    assert "could not be sent" in unpack(failed.error).message
