"""Serving from the command line: checks first, then `bentoml serve` as a child that is watched until it is
ready.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from hypergen.config import ServerSettings, Settings
from hypergen.engine_client.prestart import PrestartedEngine
from hypergen.errors import ConfigurationError, ModelError

_SILENCE_S = 120  # a worker that cannot even be imported is started again and again by BentoML
_PACKAGE = Path(__file__).resolve().parents[1]


def service_folder() -> Path:
    """Where service.py lies: beside the package in a clone, inside it in an installed wheel."""
    packaged = _PACKAGE / "bento"
    return packaged if packaged.exists() else _PACKAGE.parent


def check_port(server: ServerSettings) -> None:
    """Find out now, not after the model was loaded, whether the address can be listened on.

    Raises:
        ConfigurationError: the port is in use, or the host is no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            server.host, server.port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        where = f"{server.host}:{server.port}"
        raise ConfigurationError(
            f"Cannot listen on {where}: {error.strerror}. Choose another --port."
        ) from None


def run_service(
    settings: Settings,
    environment: Mapping[str, str],
    model_path: Path,
    reload: bool,
    say: Callable[[str], None],
) -> int:
    """Run the service until it ends or a signal ends it; returns its exit code.

    Args:
        environment: settings for the service, added to this process's own environment.
        model_path: the folder of the model that it will serve.

    Raises:
        ModelError: the first load failed; the service is gone again.
    """
    server = settings.server
    command = [sys.executable, "-m", "bentoml", "serve", "service:HyperGen", "--host", server.host]
    command += ["--port", str(server.port), "--working-dir", str(service_folder())]
    # BentoML's own limit comes a little later than ours, for what hangs.
    command += ["--timeout-graceful-shutdown", str(math.ceil(settings.queue.drain_timeout_s) + 10)]
    if reload:
        command.append("--reload")
    launcher = {"_HYPERGEN_LAUNCHER_PID": str(os.getpid()), "BENTOML_DO_NOT_TRACK": "True"}
    started = time.monotonic()
    prestarted = PrestartedEngine(model_path)
    launcher |= prestarted.environment
    # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
    child = subprocess.Popen(command, env={**os.environ, **environment, **launcher}, start_new_session=True)
    _pass_signals_on(child)
    try:
        status = _wait_until_loaded(child, _local_url(server))
        if status:
            seconds, url = time.monotonic() - started, _url(server, server.host)
            took = _stages(status, seconds)
            say(f"Ready after {seconds:.1f} s ({took}): {status['model']} on {status['device']}, {url}")
        return _exit_code(child.wait())
    except ModelError:
        child.terminate()
        child.wait()
        raise
    finally:
        prestarted.close()


def _stages(status: dict[str, Any], seconds: float) -> str:
    """Where the time went: the service, and what the slowest engine did after it."""
    engine: dict[str, float] = max((e["startup_s"] for e in status["engines"]), key=lambda s: sum(s.values()))
    stages = {"service": seconds - sum(engine.values()), **engine}
    return ", ".join(f"{name} {taken:.1f}" for name, taken in stages.items())


def _wait_until_loaded(child: subprocess.Popen[bytes], url: str) -> dict[str, Any]:
    """The `/health` of a loaded model; an empty one when the service ended before.

    Raises:
        ModelError: the model could not be loaded, or the service does not answer at all.
    """
    # No proxy of the environment may come between: this is our own child.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    silent_since = time.monotonic()
    while child.poll() is None:
        status = _health(opener, url)
        if status:
            silent_since = time.monotonic()
        if status.get("status") == "failed":
            raise ModelError(f"The model could not be loaded. {status['reason']}")
        if status.get("status") == "healthy":
            return status
        if time.monotonic() - silent_since > _SILENCE_S:
            raise ModelError("The service did not start; its log above says why.")
        time.sleep(0.1)
    return {}


def _health(opener: urllib.request.OpenerDirector, url: str) -> dict[str, Any]:
    """What `/health` says; an empty answer while nobody listens."""
    try:
        try:
            body = opener.open(f"{url}/health", timeout=2).read()
        except urllib.error.HTTPError as error:
            body = error.read()
        return json.loads(body)
    except (OSError, ValueError, http.client.HTTPException):
        return {}


def _local_url(server: ServerSettings) -> str:
    return _url(server, {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host))


def _url(server: ServerSettings, host: str) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{server.port}"


def _pass_signals_on(child: subprocess.Popen[bytes]) -> None:
    """The first signal lets the service drain, the second ends it now."""
    asked = 0

    def pass_on(_signum: int, _frame: object) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            child.terminate()
            return
        # One by one: BentoML gives its workers sessions of their own, so no process group holds them all.
        with suppress(psutil.Error):
            for process in [*psutil.Process(child.pid).children(recursive=True), psutil.Process(child.pid)]:
                process.kill()

    signal.signal(signal.SIGINT, pass_on)
    signal.signal(signal.SIGTERM, pass_on)


def _exit_code(code: int) -> int:
    return 128 - code if code < 0 else code
