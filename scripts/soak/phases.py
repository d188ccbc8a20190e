"""The phases of a soak, each with the figures that it must keep."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from scripts.bench.servers import GENERATIONS, Server
from scripts.soak.hostile_inputs import HostileInput, hostile_inputs

_HEALTH_S = 1.0
_RECOVERY_S = 30.0
_GROWTH_MB = 20.0
_FLOOD = 200
_HANG_UPS = 50
_KILLS = 3
_QUICK = {"prompt": "a red circle", "num_inference_steps": 2, "size": "256x256", "seed": 1}
_SLOW = {**_QUICK, "num_inference_steps": 40}


@dataclass(frozen=True)
class Figure:
    """A measured figure next to what is promised."""

    what: str
    result: str
    promised: str
    is_kept: bool


@dataclass
class Soak:
    """A server under test and what was found of it.

    Attributes:
        requests: of the phase that measures growth.
    """

    server: Server
    key: str
    requests: int
    figures: list[Figure] = field(default_factory=list[Figure])
    health_s: list[float] = field(default_factory=list[float])
    started_at: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_at

    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.server.url, headers=headers, timeout=300, trust_env=False)

    def add(self, what: str, result: object, promised: str, is_kept: bool) -> None:
        self.figures.append(Figure(what, str(result), promised, is_kept))

    def health(self) -> dict[str, Any]:
        with self.client() as client:
            started = time.monotonic()
            body = client.get("/health").json()
            self.health_s.append(time.monotonic() - started)
        return body

    def wait_until_healthy(self, queue_size: int = 0) -> float:
        """Seconds until the server was healthy, with at most this many unfinished requests."""
        started = time.monotonic()
        while (health := self.health())["status"] != "healthy" or health["queue_size"] > queue_size:
            if time.monotonic() - started > _RECOVERY_S:
                break
            time.sleep(0.05)
        return time.monotonic() - started

    def generate(self, body: dict[str, Any]) -> httpx.Response:
        with self.client() as client:
            return client.post(GENERATIONS, json=body)

    def images(self, body: dict[str, Any]) -> list[str] | None:
        """The images in base64; None: the request failed."""
        response = self.generate({**body, "response_format": "b64_json"})
        return [each["b64_json"] for each in response.json()["data"]] if response.is_success else None

    def processes(self) -> list[psutil.Process]:
        main = psutil.Process(self.server.process.pid)
        return [main, *main.children(recursive=True)]

    def engine(self) -> psutil.Process:
        return next(each for each in self.processes() if "hypergen.engine.worker_main" in each.cmdline())

    @contextmanager
    def watching_health(self) -> Iterator[list[float]]:
        """Requests to /health all the time; their seconds."""
        stop, first = threading.Event(), len(self.health_s)
        seconds: list[float] = []

        def watch() -> None:
            while not stop.wait(0.05):
                self.health()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield seconds
        finally:
            stop.set()
            thread.join()
            seconds += self.health_s[first:]


def hostile(soak: Soak) -> None:
    """Each hostile input gets the status that is right for it, and harms no neighbour."""
    expected = soak.images(_QUICK)
    wrong: list[str] = []
    inputs = hostile_inputs()
    with soak.client() as client:
        for each in inputs:
            status = _send(client, each)
            if status not in each.statuses:
                wrong.append(f"{each.name}: {status}")
    refused = f"{len(inputs) - len(wrong)} of {len(inputs)}" + "".join(f"; {each}" for each in wrong[:5])
    soak.add("hostile inputs with the right error", refused, "all", not wrong)
    soak.add(
        "bytes of an image afterwards",
        "equal" if soak.images(_QUICK) == expected else "other",
        "equal",
        soak.images(_QUICK) == expected,
    )


def _send(client: httpx.Client, given: HostileInput) -> int | str:
    headers = dict(given.headers)
    if given.authorization is not None:
        headers["Authorization"] = given.authorization
    try:
        return client.request(given.method, given.path, content=given.body, headers=headers).status_code
    except httpx.HTTPError as error:
        return type(error).__name__


def flood(soak: Soak) -> None:
    """More requests at once than the queue holds: each is answered, with an image or with 429."""
    with ThreadPoolExecutor(_FLOOD) as clients, soak.watching_health() as health_s:
        answers = list(clients.map(lambda seed: soak.generate({**_QUICK, "seed": seed}), range(_FLOOD)))
    statuses = Counter(answer.status_code for answer in answers)
    result = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    soak.add(f"{_FLOOD} requests at once", result, "200 or 429", set(statuses) <= {200, 429})
    refused = [answer for answer in answers if answer.status_code == 429]
    with_hint = sum("retry-after" in answer.headers for answer in refused)
    soak.add(
        "of the 429, with Retry-After", f"{with_hint} of {len(refused)}", "all", with_hint == len(refused)
    )
    slowest = max(health_s)
    soak.add("slowest /health meanwhile", f"{slowest:.2f} s", f"{_HEALTH_S} s", slowest <= _HEALTH_S)


def hang_ups(soak: Soak) -> None:
    """Clients that hang up while their request waits or runs: their work ends."""
    host, port = soak.server.url.removeprefix("http://").split(":")
    body = json.dumps(_SLOW).encode()
    head = (
        f"POST {GENERATIONS} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {soak.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with ExitStack() as connections:
        for _ in range(_HANG_UPS):
            connection = connections.enter_context(socket.create_connection((host, int(port))))
            connection.sendall(head.encode() + body)
        while (health := soak.health())["queue_size"] < _HANG_UPS or not health["running"]:
            time.sleep(0.05)
    seconds = soak.wait_until_healthy()
    soak.add(f"empty queue after {_HANG_UPS} clients hung up", f"{seconds:.1f} s", "5 s", seconds <= 5)


def kills(soak: Soak) -> None:
    """The engine is killed in the middle of requests: they get the same bytes, a little later."""
    bodies = [{**_SLOW, "seed": seed} for seed in range(6)]
    expected = [soak.images(body) for body in bodies]
    equal = 0
    recovery_s: list[float] = []
    for _ in range(_KILLS):
        with ThreadPoolExecutor(len(bodies)) as clients:
            running = [clients.submit(soak.images, body) for body in bodies]
            while not soak.health()["running"]:
                time.sleep(0.02)
            soak.engine().kill()
            while soak.health()["status"] == "healthy":
                time.sleep(0.01)
            recovery_s.append(soak.wait_until_healthy(queue_size=len(bodies)))
            equal += sum(each.result() == one for each, one in zip(running, expected, strict=True))
    total = _KILLS * len(bodies)
    soak.add(
        f"requests with equal bytes, engine killed {_KILLS} times",
        f"{equal} of {total}",
        "all",
        equal == total,
    )
    longest = max(recovery_s)
    soak.add(
        "longest recovery of the engine", f"{longest:.1f} s", f"{_RECOVERY_S:.0f} s", longest < _RECOVERY_S
    )


def growth(soak: Soak) -> None:
    """Requests one after another: memory, file descriptors and threads stay."""

    def measure() -> tuple[float, int, int]:
        processes = soak.processes()
        return (
            sum(each.memory_info().rss for each in processes) / 1e6,
            sum(each.num_fds() for each in processes),
            sum(each.num_threads() for each in processes),
        )

    # After a start the engine's memory grows for some 400 requests, while kernels keep what they allocated.
    warm_up = max(100, soak.requests // 2)
    with ThreadPoolExecutor(4) as clients:
        list(clients.map(lambda seed: soak.generate({**_QUICK, "seed": seed}).status_code, range(warm_up)))
        soak.wait_until_healthy()
        before = measure()
        started = time.monotonic()
        statuses = Counter(
            clients.map(
                lambda seed: soak.generate({**_QUICK, "seed": seed}).status_code, range(soak.requests)
            )
        )
        seconds = time.monotonic() - started
    soak.wait_until_healthy()
    memory, descriptors, threads = (now - then for now, then in zip(measure(), before, strict=True))
    soak.add(
        f"{soak.requests} requests, four at a time",
        f"{statuses[200]} x 200 in {seconds:.0f} s",
        "all",
        statuses[200] == soak.requests,
    )
    soak.add("growth of all processes", f"{memory:.1f} MB", f"{_GROWTH_MB:.0f} MB", memory <= _GROWTH_MB)
    soak.add(
        "more file descriptors, threads",
        f"{descriptors}, {threads}",
        "at most 4",
        max(descriptors, threads) <= 4,
    )


def drain(soak: Soak) -> None:
    """SIGTERM during requests: they are answered, and the server ends."""
    with ThreadPoolExecutor(6) as clients:
        running = [clients.submit(soak.generate, {**_SLOW, "seed": seed}) for seed in range(6)]
        while soak.health()["queue_size"] < len(running):
            time.sleep(0.02)
        soak.server.process.send_signal(signal.SIGTERM)
        answered = sum(each.result().status_code == 200 for each in running)
    code = soak.server.process.wait(90)
    soak.add(
        "requests answered after SIGTERM", f"{answered} of {len(running)}", "all", answered == len(running)
    )
    soak.add("exit code", code, "0", code == 0)


PHASES: tuple[Callable[[Soak], None], ...] = (hostile, flood, hang_ups, kills, growth, drain)
