"""Failures in the threads of an engine process and of its supervisor."""

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
from hypergen.engine_client.accelerators import Accelerator
from hypergen.engine_client.engine_process import Supervisor
from hypergen.errors import unpack
from hypergen.events import EngineStatus, Preview, Started
from tests.support.sync_engine import make_request, served_model

_INVALID_PICKLE = (3).to_bytes(8, "big") + b"abc"


async def _lose_engine(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes, message: Any
) -> Supervisor:
    """The supervisor of a process that sends these bytes and receives this message, after `on_lost`."""
    engine = folder / "engine"
    engine.write_text(
        f"#!{sys.executable}\nimport os, sys, time\nos.write(int(sys.argv[-1]), {sent!r})\ntime.sleep(600)\n"
    )
    engine.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(engine))
    lost = asyncio.Event()
    supervisor = Supervisor(
        ipc.Start(()),
        Accelerator(),
        on_ready=lambda _: None,
        on_message=lambda _, __: None,
        on_lost=lambda _: lost.set(),
    )
    supervisor.launch()
    supervisor.send(ipc.Submit(message))
    async with asyncio.timeout(60):
        await lost.wait()
    return supervisor


@pytest.mark.parametrize("direction", ["receive", "send"])
async def test_an_engine_with_a_failing_connection_is_killed_and_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    unpicklable = threading.Lock()
    sent, message = (b"", unpicklable) if direction == "send" else (_INVALID_PICKLE, make_request())
    supervisor = await _lose_engine(tmp_path, monkeypatch, sent, message)
    assert supervisor.status.state == "failed"
    assert supervisor.pid is not None
    assert not psutil.pid_exists(supervisor.pid)


def test_an_engine_that_cannot_read_a_message_exits_with_code_13(sd_folder: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        arguments = ["-P", "-m", "hypergen.engine.worker_main", str(theirs.fileno())]
        with subprocess.Popen([sys.executable, *arguments], pass_fds=[theirs.fileno()]) as engine:
            try:
                ipc.send(ours, ipc.Start((served_model(sd_folder),)))
                ours.sendall(_INVALID_PICKLE)
                assert engine.wait(60) == 13
            finally:
                engine.kill()


def test_child_processes_of_an_engine_do_not_inherit_its_connection() -> None:
    """Otherwise a child that still runs would hide the exit of the engine."""
    theirs, ours = socket.socketpair()
    with theirs, ours:
        descriptor = os.dup(theirs.fileno())
        os.set_inheritable(descriptor, True)
        connection, _ = worker_main._connect([str(descriptor)])
        with connection:
            assert connection.get_inheritable() is False


def test_heartbeats_continue_with_the_last_status_if_there_is_no_new_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager = ModelManager([], None, lambda *_: pytest.fail("no model"), lambda *_: None)
    del manager.startup_s  # `status` reads it
    last_status = EngineStatus(state="ready", forwards=7)
    outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    class StopTest(BaseException):
        pass

    def stop_after_three(_seconds: float) -> None:
        if outbox.qsize() == 3:
            raise StopTest

    monkeypatch.setattr(worker_main.time, "sleep", stop_after_three)
    with pytest.raises(StopTest):
        worker_main._send_heartbeats(manager, last_status, outbox)
    assert [outbox.get().status for _ in range(3)] == [last_status] * 3
    assert caplog.text.count("The status could not be read") == 1


def test_an_event_that_cannot_be_sent_fails_only_its_request() -> None:
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
