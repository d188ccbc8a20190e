"""Serving from the command line: checks first, then `bentoml serve` as a child that is watched until it is
ready.
"""

from __future__ import annotations

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
from pathlib import Path
from typing import Any

from hypergen.config import ServerSettings, Settings
from hypergen.errors import ConfigurationError, ModelError

_PACKAGE = Path(__file__).resolve().parent


def service_folder() -> Path:
    """Where service.py lies: beside the package in a clone, inside it in an installed wheel."""
    beside = _PACKAGE.parent
    return (
        beside
        if (beside / "service.py").exists() and (beside / "hypergen") == _PACKAGE
        else _PACKAGE / "bento"
    )


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


def serve(
    settings: Settings, environment: Mapping[str, str], reload: bool, say: Callable[[str], None]
) -> int:
    """Run the service until it ends or a signal ends it; returns its exit code.

    Args:
        environment: settings for the service, added to this process's own environment.

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
    # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
    child = subprocess.Popen(command, env={**os.environ, **environment, **launcher}, start_new_session=True)
    _pass_signals_on(child)
    status = _wait_until_loaded(child, server)
    if status.get("status") == "failed":
        child.terminate()
        child.wait()
        raise ModelError(f"The model could not be loaded: {status['reason']}")
    if status:
        seconds = time.monotonic() - started
        address = f"http://{server.host}:{server.port}"
        say(f"Ready after {seconds:.1f} s: {status['model']} on {status['device']}, {address}")
    return _exit_code(child.wait())


def _wait_until_loaded(child: subprocess.Popen[bytes], server: ServerSettings) -> dict[str, Any]:
    """The first `/health` that says healthy or failed; an empty one when the service ended before."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(server.host, server.host)
    # No proxy of the environment may come between: this is our own child.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while child.poll() is None:
        try:
            body = opener.open(f"http://{host}:{server.port}/health", timeout=2).read()
        except urllib.error.HTTPError as error:
            body = error.read()
        except OSError:
            body = b"{}"
        try:
            status = json.loads(body)
        except ValueError:
            status = {}
        if status.get("status") in ("healthy", "failed"):
            return status
        time.sleep(0.1)
    return {}


def _pass_signals_on(child: subprocess.Popen[bytes]) -> None:
    """The first signal lets the service drain, the second ends it now."""
    asked = 0

    def pass_on(_signum: int, _frame: object) -> None:
        nonlocal asked
        asked += 1
        if child.poll() is None:
            if asked == 1:
                child.terminate()
            else:
                os.killpg(child.pid, signal.SIGKILL)

    signal.signal(signal.SIGINT, pass_on)
    signal.signal(signal.SIGTERM, pass_on)


def _exit_code(code: int) -> int:
    return 128 - code if code < 0 else code
