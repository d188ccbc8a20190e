"""The main of an engine process: loads its models, then generates until its parent process stops it or exits.

The pool starts it as `python -m hypergen.engine.worker_main FD`; file descriptor FD is one end of a socket
pair. `hypergen serve` prestarts it as `... --prestarted FD MODEL`: then it imports the packages for MODEL and
waits for a pool to connect to FD.
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

_ATTACH_TIMEOUT_S = 120

# Share of a GPU's memory for the weights of several models; the rest is for generation.
_WEIGHTS_MEMORY_SHARE = 0.8


def main() -> None:
    # BentoML's process manager signals a worker's children before it drains the worker; the pool decides
    # instead.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log_setup.configure("engine")
    # A sixth of the import time would go to garbage collection, and imported modules are never garbage.
    gc.disable()
    connection, imports = _connect(sys.argv[1:])
    start = ipc.receive(connection)
    if not isinstance(start, ipc.Start):
        os._exit(0)
    log_setup.configure("engine", ", ".join(model.id for model in start.models))
    outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_run_thread, args=(_write, connection, outbox), daemon=True).start()

    managers: list[ModelManager] = []
    # Read from the start, to notice a parent that exits while the models load.
    threading.Thread(target=_run_thread, args=(_read, connection, managers), daemon=True).start()
    try:
        started = time.monotonic()
        imports.result()
        for model in start.models:
            import_all(model.path)
        imported_s = time.monotonic() - started
        # Imported late because it takes seconds, in which signals and the parent must already be handled.
        import torch

        torch.set_num_threads(_threads(start, torch.get_num_threads()))
        # A kernel chosen by timing may give other bits after a restart.
        torch.backends.cudnn.benchmark = False
        manager, loader = _make_model_manager(start, outbox)
        model_infos = manager.load_all()
        stages = {"imports": imported_s, **loader.seconds}
        manager.startup_s = {name: round(seconds, 3) for name, seconds in stages.items()}
        gc.freeze()
        gc.enable()
    except Exception as error:  # report any failure to the parent process
        reason = str(error)
        if not isinstance(error, HyperGenError):
            logger.exception("A model could not be loaded.")
            # /health is public, so it does not get the message.
            reason = f"{type(error).__name__}; see the server's log for details"
        ipc.send(connection, ipc.LoadFailed(" ".join(reason.split())[:500]))
        os._exit(1)
    managers.append(manager)
    status = manager.status()
    outbox.put(ipc.Loaded(model_infos, status))
    threading.Thread(target=_send_heartbeats, args=(manager, status, outbox), daemon=True).start()
    try:
        manager.run()
    except Exception:  # the device is lost; only a new process can use it again
        logger.exception("The engine crashed; exiting.")
        os._exit(13)


def _make_model_manager(start: ipc.Start, outbox: queue.SimpleQueue[Any]) -> tuple[ModelManager, Loader]:
    """The models of this process, not loaded yet.

    Raises:
        ModelError: a model is not supported, or larger than the memory for models.
    """
    import torch

    from hypergen.engine import host_memory
    from hypergen.engine.model_loader import Loader
    from hypergen.engine.model_manager import ModelManager
    from hypergen.models import loading

    settings = start.models[0].settings
    report = _reporter(outbox)
    alone = len(start.models) == 1
    loader = Loader(report, alone=alone, state_folder=start.state_folder, on_forward=outbox.put)
    evicts = not alone or settings.idle_unload_s is not None
    on_cuda = evicts and loading.choose_device(settings).type == "cuda"
    host_limit_bytes = host_memory.limit_bytes(settings, start.engines) if on_cuda else 0.0
    if alone:  # without other models to evict, a limit is of no use
        limit_bytes, expected = None, [(start.models[0], 0)]
    else:
        limit_bytes = None if settings.model_memory_gb is None else settings.model_memory_gb * 1e9
        if on_cuda and limit_bytes is None:
            limit_bytes = _WEIGHTS_MEMORY_SHARE * torch.cuda.get_device_properties(0).total_memory
        expected = [(model, loading.expected_bytes(model.path, model.settings)) for model in start.models]
    manager = ModelManager(
        expected, limit_bytes, loader, report, host_limit_bytes, idle_unload_s=settings.idle_unload_s
    )
    return manager, loader


def _connect(argv: list[str]) -> tuple[socket.socket, Future[None]]:
    """The connection to the pool, and the imports, which a prestarted engine runs while it waits."""
    imports: Future[None] = Future()
    imports.set_result(None)
    prestarted = argv[0] == "--prestarted"
    descriptor = int(argv[1] if prestarted else argv[0])
    # A child process would inherit it, and the pool would not notice that this process has exited.
    os.set_inheritable(descriptor, False)
    if not prestarted:
        return socket.socket(fileno=descriptor), imports
    _, _, model_path = argv
    listener = socket.socket(fileno=descriptor)
    imports = ThreadPoolExecutor(1).submit(import_all, Path(model_path))
    return _wait_for_attach(listener), imports


def _wait_for_attach(listener: socket.socket) -> socket.socket:
    """A prestarted engine's connection to the pool. Without one, the process exits after two minutes, or with
    its launcher.
    """
    ready, _, _ = select.select([listener, sys.stdin], [], [], _ATTACH_TIMEOUT_S)
    if listener not in ready:
        # A killed launcher could not remove the socket's folder.
        shutil.rmtree(Path(listener.getsockname()).parent, ignore_errors=True)
        os.kill(os.getpid(), signal.SIGKILL)  # another thread may still import
    connection, _ = listener.accept()
    listener.close()
    return connection


def import_all(model_path: Path) -> None:
    """Import all packages that a model needs.

    Raises:
        ModelError: unknown model family.
    """
    import torch  # noqa: F401

    _silence_libraries()
    from hypergen.engine import model_loader  # noqa: F401
    from hypergen.models import loading

    loading.import_family(model_path)


def _silence_libraries() -> None:
    """Turn off progress bars and hints, which are for notebooks; errors are logged as ours are."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_default_handler()
        library.enable_propagation()
        library.disable_progress_bar()


def usable_cores() -> int:
    """Cores that this process may use: a container's quota, not the machine's, or threads would compete."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        share = cores if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        share = cores
    return min(share, cores)


def _threads(start: ipc.Start, default: int) -> int:
    """Threads of torch. Engines on the CPU share its cores evenly: another number gives other bytes."""
    from hypergen.models import loading

    engines = start.engines if loading.choose_device(start.models[0].settings).type == "cpu" else 1
    return max(1, min(usable_cores() // engines, default))


def _reporter(outbox: queue.SimpleQueue[Any]) -> Any:
    def report(request_id: str, event: Event | RequestError) -> None:
        if isinstance(event, RequestError):
            outbox.put(ipc.Failed(request_id, pack(event)))
        else:
            outbox.put(ipc.EventMessage(request_id, event))

    return report


def _run_thread(target: Callable[..., None], *args: Any) -> None:
    """Run a thread's function. If it fails, exit: the process could not receive or send any more."""
    try:
        target(*args)
    except Exception:
        logger.exception("The engine lost its connection to the server; exiting.")
        os._exit(13)


def _write(connection: socket.socket, outbox: queue.SimpleQueue[Any]) -> None:
    while True:
        message = outbox.get()
        try:
            ipc.send(connection, message)
        except OSError:
            os._exit(0)
        except Exception:  # in `pickle`, before any byte was sent
            if not isinstance(message, ipc.EventMessage):
                raise
            logger.exception("An event of request %s could not be sent.", message.request_id)
            failure = GenerationError("The image could not be sent; see the server's log for details.")
            outbox.put(ipc.Failed(message.request_id, pack(failure)))


def _read(connection: socket.socket, managers: list[ModelManager]) -> None:
    """Pass requests to the one manager in the list. The pool sends none before the models are loaded."""
    while True:
        message = ipc.receive(connection)
        match message:
            case ipc.Submit(request=request):
                managers[0].submit(request)
            case ipc.Cancel(request_id=request_id):
                managers[0].cancel(request_id)
            case _:  # Shutdown, or None: the parent exited. The main thread may be busy in a kernel.
                os._exit(0)


def _send_heartbeats(manager: ModelManager, status: EngineStatus, outbox: queue.SimpleQueue[Any]) -> None:
    """Send a heartbeat every second, with the last known status if there is no new one."""
    logged: set[type[Exception]] = set()
    while True:
        try:
            status = manager.status()
        except Exception as error:  # without heartbeats the watchdog would kill a busy engine
            if type(error) not in logged:
                logger.exception("The status could not be read; sending the last known one.")
            logged.add(type(error))
        outbox.put(ipc.Heartbeat(time.monotonic() - manager.last_step_at, status))
        time.sleep(1)


if __name__ == "__main__":
    main()
