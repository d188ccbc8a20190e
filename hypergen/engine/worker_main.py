"""The main of an engine process: loads its models, then draws until its parent says so or is gone.

Started by the pool as `python -m hypergen.engine.worker_main FD`, with one end of a socket pair as descriptor
FD, or by `hypergen serve` as `... --prestarted FD MODEL`, to import what MODEL needs until a pool connects to
FD.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypergen import ipc, log_setup
from hypergen.errors import GenerationError, HyperGenError, RequestError, pack
from hypergen.events import EngineStatus, Event

if TYPE_CHECKING:
    from hypergen.engine.model_loader import Loader
    from hypergen.engine.model_manager import ModelManager

logger = logging.getLogger(__name__)

_ATTACHED_WITHIN_S = 120

# What the weights of several models may take of a GPU's memory; the rest is for drawing.
_SHARE_OF_GPU = 0.8


def main() -> None:
    # BentoML's process manager signals a worker's children before it drains the worker; the pool decides
    # instead.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log_setup.configure("engine")
    # A sixth of the time of the imports would go to looking for garbage among what stays for ever.
    gc.disable()
    connection, imports = _connect(sys.argv[1:])
    start = ipc.receive(connection)
    if not isinstance(start, ipc.Start):
        os._exit(0)
    outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_serve, args=(_write, connection, outbox), daemon=True).start()

    managers: list[ModelManager] = []
    # Reads from the start, so that a parent that leaves while the models load is noticed.
    threading.Thread(target=_serve, args=(_read, connection, managers), daemon=True).start()
    try:
        started = time.monotonic()
        imports.result()
        for model in start.models:
            import_all(model.path)
        imported_s = time.monotonic() - started
        # Imported this late because it takes seconds, in which signals and the parent already matter.
        import torch

        torch.set_num_threads(min(usable_cores(), torch.get_num_threads()))
        torch.backends.cudnn.benchmark = False  # a kernel chosen by timing may give other bits tomorrow
        manager, loader = _make_model_manager(start, outbox)
        descriptions = manager.load_all()
        stages = {"imports": imported_s, **loader.seconds}
        manager.startup_s = {name: round(seconds, 3) for name, seconds in stages.items()}
        gc.freeze()
        gc.enable()
    except Exception as error:  # the last edge: whatever it is, the parent must hear of it
        reason = str(error)
        if not isinstance(error, HyperGenError):
            logger.exception("A model could not be loaded.")
            reason = (
                f"{type(error).__name__}; the server's log has the details"  # /health shows it to everybody
            )
        ipc.send(connection, ipc.LoadFailed(" ".join(reason.split())[:500]))
        os._exit(1)
    managers.append(manager)
    status = manager.status()
    outbox.put(ipc.Loaded(descriptions, status))
    threading.Thread(target=_send_heartbeats, args=(manager, status, outbox), daemon=True).start()
    try:
        manager.run()
    except Exception:  # the device is lost; a new process gets a new one
        logger.exception("The engine cannot go on.")
        os._exit(13)


def _make_model_manager(start: ipc.Start, outbox: queue.SimpleQueue[Any]) -> tuple[ModelManager, Loader]:
    """The models of this process, not loaded yet.

    Raises:
        ModelError: one is of no kind that can be served, or larger than the memory for models.
    """
    import torch

    from hypergen.engine.model_loader import Loader
    from hypergen.engine.model_manager import ModelManager
    from hypergen.models import loading

    settings = start.models[0].settings
    report = _reporter(outbox)
    alone = len(start.models) == 1
    loader = Loader(report, alone=alone)
    if alone:  # nothing could be moved out for it
        return ModelManager([(start.models[0], 0)], None, loader, report), loader
    limit_bytes = None if settings.model_memory_gb is None else settings.model_memory_gb * 1e9
    if limit_bytes is None and loading.choose_device(settings).type == "cuda":
        limit_bytes = _SHARE_OF_GPU * torch.cuda.get_device_properties(0).total_memory
    expected = [(model, loading.expected_bytes(model.path, model.settings)) for model in start.models]
    return ModelManager(expected, limit_bytes, loader, report), loader


def _connect(arguments: list[str]) -> tuple[socket.socket, Future[None]]:
    """The connection to the pool, and the imports that a spare began while it waited for it."""
    imports: Future[None] = Future()
    imports.set_result(None)
    descriptor = int(arguments[0] if arguments[0] != "--prestarted" else arguments[1])
    # A process that this one starts would inherit it, and the pool would not see that this one has died.
    os.set_inheritable(descriptor, False)
    if arguments[0] != "--prestarted":
        return socket.socket(fileno=descriptor), imports
    _, _, model_path = arguments
    listener = socket.socket(fileno=descriptor)
    imports = ThreadPoolExecutor(1).submit(import_all, Path(model_path))
    return _wait_for_attach(listener), imports


def _wait_for_attach(listener: socket.socket) -> socket.socket:
    """The spare's side: the connection to the pool; without one, the process ends after two minutes, or with
    its launcher.
    """
    ready, _, _ = select.select([listener, sys.stdin], [], [], _ATTACHED_WITHIN_S)
    if listener not in ready:
        # A launcher that was killed could not remove the folder of the socket.
        shutil.rmtree(Path(listener.getsockname()).parent, ignore_errors=True)
        os.kill(os.getpid(), signal.SIGKILL)  # imports may be under way in another thread
    connection, _ = listener.accept()
    listener.close()
    return connection


def import_all(model_path: Path) -> None:
    """Everything that drawing with a model needs.

    Raises:
        ModelError: the model is of no known family.
    """
    import torch  # noqa: F401

    from hypergen.engine import model_loader  # noqa: F401
    from hypergen.models import loading

    _quieten_libraries()
    loading.import_family(model_path)


def _quieten_libraries() -> None:
    """Their progress bars and hints are for notebooks; what matters to an operator, they raise."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def usable_cores() -> int:
    """Cores that this process may use: a container's share, not the machine's, or threads fight for time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        share = cores if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        share = cores
    return min(share, cores)


def _reporter(outbox: queue.SimpleQueue[Any]) -> Any:
    def report(request_id: str, event: Event | RequestError) -> None:
        if isinstance(event, RequestError):
            outbox.put(ipc.Failed(request_id, pack(event)))
        else:
            outbox.put(ipc.EventMessage(request_id, event))

    return report


def _serve(work: Callable[..., None], *arguments: Any) -> None:
    """The work of a thread; if it fails the process ends, which would hear or say nothing any more."""
    try:
        work(*arguments)
    except Exception:
        logger.exception("The engine cannot talk to the server any more.")
        os._exit(13)


def _write(connection: socket.socket, outbox: queue.SimpleQueue[Any]) -> None:
    while True:
        message = outbox.get()
        try:
            ipc.send(connection, message)
        except OSError:
            os._exit(0)
        except Exception:  # nothing of the message was sent yet
            if not isinstance(message, ipc.EventMessage):
                raise
            logger.exception("An event of %s could not be sent.", message.request_id)
            failure = GenerationError("The image could not be sent; the server's log says why.")
            outbox.put(ipc.Failed(message.request_id, pack(failure)))


def _read(connection: socket.socket, managers: list[ModelManager]) -> None:
    """Requests go to the one manager in the list; the pool sends none before that."""
    while True:
        message = ipc.receive(connection)
        match message:
            case ipc.Submit(request):
                managers[0].submit(request)
            case ipc.Cancel(request_id):
                managers[0].cancel(request_id)
            case _:  # Shutdown, or None: the parent is gone; the main thread may be deep in a kernel
                os._exit(0)


def _send_heartbeats(manager: ModelManager, status: EngineStatus, outbox: queue.SimpleQueue[Any]) -> None:
    """Say every second that the engine lives; without a status, with the last one that there was."""
    logged: set[type[Exception]] = set()
    while True:
        try:
            status = manager.status()
        except Exception as error:  # silence would be taken for a stall, and a busy engine killed
            if type(error) not in logged:
                logger.exception("The status cannot be told; the last one is told again.")
            logged.add(type(error))
        outbox.put(ipc.Heartbeat(time.monotonic() - manager.last_step_at, status))
        time.sleep(1)


if __name__ == "__main__":
    main()
