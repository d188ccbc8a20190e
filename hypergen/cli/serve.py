"""`hypergen serve`: checks, then `bentoml serve` as a child process, and a wait until it is ready."""

from __future__ import annotations

import http.client
import json
import logging
import math
import os
import secrets
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from hypergen.api.api_keys import LAUNCHER_KEY
from hypergen.config import ServerSettings, Settings
from hypergen.engine_client.accelerators import find_accelerators
from hypergen.engine_client.prestart import PrestartedEngine
from hypergen.errors import ModelError

logger = logging.getLogger(__name__)

_SILENCE_S = 120  # BentoML restarts a worker that cannot be imported for ever
_PACKAGE = Path(__file__).resolve().parents[1]


def service_folder() -> Path:
    """The folder of service.py: next to the package in a clone, inside it in an installed wheel."""
    packaged = _PACKAGE / "bento"
    return packaged if packaged.exists() else _PACKAGE.parent


def run_service(
    settings: Settings,
    environment: Mapping[str, str],
    model_path: Path,
    reload: bool,
) -> int:
    """Run the service until it ends or a signal ends it; returns its exit code.

    Args:
        environment: settings for the service, added to this process's environment.
        model_path: the folder of the first model.

    Raises:
        ModelError: the first load failed; the service has ended.
    """
    server = settings.server
    command = [sys.executable, "-m", "bentoml", "serve", "service:HyperGen", "--host", server.host]
    command += ["--port", str(server.port), "--working-dir", str(service_folder())]
    # Later than our own limit, for requests that hang.
    command += ["--timeout-graceful-shutdown", str(math.ceil(settings.queue.drain_timeout_s) + 10)]
    if reload:
        command.append("--reload")
    launcher = {"_HYPERGEN_LAUNCHER_PID": str(os.getpid()), "BENTOML_DO_NOT_TRACK": "True"}
    launcher[LAUNCHER_KEY] = key = secrets.token_urlsafe()
    started = time.monotonic()
    first = find_accelerators(settings.engine)[0]
    prestarted = PrestartedEngine(model_path, first.environment)
    launcher |= prestarted.environment
    # In its own session, so that Ctrl-C reaches only this process, which forwards it once.
    child = subprocess.Popen(command, env={**os.environ, **environment, **launcher}, start_new_session=True)
    _forward_signals(child)
    try:
        status = _wait_until_loaded(child, _health_request(server, key))
        if status:
            seconds, url = time.monotonic() - started, _url(server, server.host)
            stages = _stages(status, seconds)
            model, devices = status["model"], ", ".join(engine["device"] for engine in status["engines"])
            logger.info("Ready after %.1f s (%s): %s on %s, %s", seconds, stages, model, devices, url)
        return _exit_code(child.wait())
    except ModelError:
        child.terminate()
        child.wait()
        raise
    finally:
        prestarted.close()


def _stages(status: dict[str, Any], seconds: float) -> str:
    """Seconds of each stage: the service, then the stages of the slowest engine."""
    engine: dict[str, float] = max((e["startup_s"] for e in status["engines"]), key=lambda s: sum(s.values()))
    stages = {"service": seconds - sum(engine.values()), **engine}
    return ", ".join(f"{name} {stage_s:.1f}" for name, stage_s in stages.items())


def _wait_until_loaded(child: subprocess.Popen[bytes], request: urllib.request.Request) -> dict[str, Any]:
    """The `/health` body once the model is loaded; empty if the service ended before.

    Raises:
        ModelError: the model could not be loaded, or the service does not respond.
    """
    # Without the proxy of the environment, and whatever its certificate says: the child is local.
    tls = ssl.create_default_context()
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls)
    )
    silent_since = time.monotonic()
    while child.poll() is None:
        status = _health(opener, request)
        if status:
            silent_since = time.monotonic()
        if status.get("status") == "failed":
            raise ModelError(f"The model could not be loaded. {status['reason']}")
        if status.get("status") == "healthy":
            return status
        if time.monotonic() - silent_since > _SILENCE_S:
            raise ModelError("The service did not start; see its log above.")
        time.sleep(0.1)
    return {}


def _health(opener: urllib.request.OpenerDirector, request: urllib.request.Request) -> dict[str, Any]:
    """The body of `/health`; empty while nothing listens."""
    try:
        try:
            body = opener.open(request, timeout=2).read()
        except urllib.error.HTTPError as error:
            body = error.read()
        return json.loads(body)
    except (OSError, ValueError, http.client.HTTPException):
        return {}


def _health_request(server: ServerSettings, key: str) -> urllib.request.Request:
    url = _url(server, {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host))
    return urllib.request.Request(f"{url}/health", headers={"Authorization": f"Bearer {key}"})


def _url(server: ServerSettings, host: str) -> str:
    scheme = "https" if server.ssl_certfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{server.port}"


def _forward_signals(child: subprocess.Popen[bytes]) -> None:
    """On the first signal drain the service, on the second kill it."""
    signals = 0

    def forward(_signum: int, _frame: object) -> None:
        nonlocal signals
        signals += 1
        if signals == 1:
            child.terminate()
            return
        # One by one: BentoML's workers have their own sessions, so there is no common process group.
        with suppress(psutil.Error):
            for process in [*psutil.Process(child.pid).children(recursive=True), psutil.Process(child.pid)]:
                process.kill()

    def reload_keys(_signum: int, _frame: object) -> None:
        with suppress(
            psutil.Error
        ):  # the children of BentoML's main process, which itself would restart them
            for worker in psutil.Process(child.pid).children():
                worker.send_signal(signal.SIGHUP)

    if not sys.stdin.isatty():  # else it says that the terminal was closed
        signal.signal(signal.SIGHUP, reload_keys)
    signal.signal(signal.SIGINT, forward)
    signal.signal(signal.SIGTERM, forward)


def _exit_code(code: int) -> int:
    return 128 - code if code < 0 else code
