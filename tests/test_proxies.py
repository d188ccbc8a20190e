"""The proxies of configs/ with the real nginx and Caddy, before a small upstream and before a server."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from hypergen.config import QueueSettings, ServerSettings
from tests.support.live_server import LiveServer, free_port

CONFIGS = Path(__file__).parents[1] / "configs"
NAME = "images.example.com"


@dataclass
class Upstream:
    """A server that answers POST in two parts, the second after `go_on`; it keeps what it has received."""

    port: int
    requests: list[bytes] = field(default_factory=list[bytes])
    part_received: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def answer(self, connection: socket.socket) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            received += connection.recv(65536)
        head, _, body = received.partition(b"\r\n\r\n")
        length = next((int(v) for k, v in _headers(head) if k == "content-length"), 0)
        while len(body) < length:
            if body:
                self.part_received.set()
            body += connection.recv(1 << 20)
        self.requests.append(head)
        connection.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\none\n\n"
        )
        self.go_on.wait(30)
        connection.sendall(b"two\n\n")
        connection.close()


def _headers(head: bytes) -> list[tuple[str, str]]:
    lines = [line.partition(":") for line in head.decode().split("\r\n")[1:]]
    return [(name.lower(), value.strip()) for name, _, value in lines]


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        upstream = Upstream(listener.getsockname()[1])

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=upstream.answer, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield upstream
        upstream.go_on.set()
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("certificate")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", f"/CN={NAME}"]
    command += ["-addext", f"subjectAltName=DNS:{NAME},DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def replace_once(text: str, changes: dict[str, str]) -> str:
    """The text with these parts replaced, each of which it must have."""
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new, 1)
    return text


def nginx_command(
    folder: Path, host: str, port: int, upstream: int, certificate: tuple[Path, Path]
) -> list[str]:
    site = replace_once(
        (CONFIGS / "nginx/hypergen.conf").read_text(encoding="utf-8"),
        {
            "server 127.0.0.1:8000 ": f"server 127.0.0.1:{upstream} ",
            "listen 443 ": f"listen 127.0.0.1:{port} ",
            f"server_name {NAME};": f"server_name {host};",
            "/etc/ssl/certs/images.example.com.pem": str(certificate[0]),
            "/etc/ssl/private/images.example.com.key": str(certificate[1]),
        },
    )
    paths = "".join(
        f"{name}_temp_path {folder}/{name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration = folder / "nginx.conf"
    main = f"daemon off;\npid {folder}/pid;\nerror_log stderr;\nevents {{}}\n"
    configuration.write_text(f"{main}http {{\naccess_log off;\n{paths}{site}}}\n")
    return ["nginx", "-e", "stderr", "-p", str(folder), "-c", str(configuration)]


def caddy_command(
    folder: Path, host: str, port: int, upstream: int, certificate: tuple[Path, Path]
) -> list[str]:
    own = f"https://{host}:{port} {{\n\tbind 127.0.0.1\n\ttls {certificate[0]} {certificate[1]}"
    site = replace_once(
        (CONFIGS / "caddy/Caddyfile").read_text(encoding="utf-8"),
        {
            f"\n{NAME} {{": f"\n{own}",
            "reverse_proxy 127.0.0.1:8000 {": f"reverse_proxy 127.0.0.1:{upstream} {{",
        },
    )
    configuration = folder / "Caddyfile"
    configuration.write_text("{\n\tadmin off\n\tauto_https disable_redirects\n}\n" + site)
    return ["caddy", "run", "--config", str(configuration)]


COMMANDS = {"nginx": nginx_command, "caddy": caddy_command}


@contextmanager
def run_proxy(
    name: str, folder: Path, upstream: int, certificate: tuple[Path, Path], host: str = NAME
) -> Iterator[httpx.Client]:
    """A client whose requests for this host go through the proxy."""
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    port = free_port()
    command = COMMANDS[name](folder, host, port, upstream, certificate)
    log = folder / "log"
    with log.open("wb") as output:
        environment = {"HOME": str(folder), "PATH": "/usr/sbin:/usr/bin:/bin"}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        until = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < until:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        assert process.poll() is None, log.read_text()
        tls = ssl.create_default_context(cafile=str(certificate[0]))
        with httpx.Client(
            base_url=f"https://127.0.0.1:{port}", verify=tls, timeout=60, trust_env=False
        ) as client:
            client.headers["Host"] = host
            yield client
    finally:
        process.terminate()
        process.wait(30)


SNI = {"sni_hostname": NAME}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_proxy_passes_on_parts_of_streams_and_uploads_as_they_come(
    name: str, tmp_path: Path, upstream: Upstream, certificate: tuple[Path, Path]
) -> None:
    forged = {"X-Forwarded-For": "1.2.3.4", "X-Forwarded-Proto": "http", "Content-Length": "20000000"}

    def upload() -> Iterator[bytes]:
        yield bytes(10_000_000)
        assert upstream.part_received.wait(30)  # without waiting for the rest
        yield bytes(10_000_000)

    with (
        run_proxy(name, tmp_path, upstream.port, certificate) as client,
        client.stream(
            "POST", "/v1/images/edits", content=upload(), headers=forged, extensions=SNI
        ) as response,
    ):
        parts = response.iter_text()
        assert next(parts) == "one\n\n"
        upstream.go_on.set()  # only now, so that the first part cannot have waited for the second
        assert "".join(parts) == "two\n\n"
    headers = dict(_headers(upstream.requests[0]))
    assert (headers["x-forwarded-for"], headers["x-forwarded-proto"]) == ("127.0.0.1", "https")
    assert headers["host"].partition(":")[0] == NAME


@pytest.mark.parametrize("name", COMMANDS)
def test_a_proxy_keeps_metrics_and_probes_to_itself(
    name: str, tmp_path: Path, upstream: Upstream, certificate: tuple[Path, Path]
) -> None:
    with run_proxy(name, tmp_path, upstream.port, certificate) as client:
        for path in ("/metrics", "/livez", "/readyz", "/healthz", "/%6Detrics", "//metrics"):
            url = f"https://127.0.0.1:{client.base_url.port}{path}"
            assert client.get(url, extensions=SNI).status_code == 404, path
    assert upstream.requests == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_server_behind_a_proxy_answers_as_without_it(
    name: str, tmp_path: Path, server: LiveServer, certificate: tuple[Path, Path]
) -> None:
    port = int(server.url.rpartition(":")[2])
    body = {"prompt": "a cat", "seed": 1, "num_inference_steps": 2, "size": "64x64"}
    route = "/v1/images/generations"
    direct = httpx.post(server.url + route, json={**body, "response_format": "b64_json"}, timeout=120).json()
    with run_proxy(name, tmp_path, port, certificate, host="localhost") as client:
        client.base_url = httpx.URL(f"https://localhost:{client.base_url.port}")
        proxied = client.post(route, json={**body, "response_format": "b64_json"}).json()
        assert proxied["data"] == direct["data"]
        headers = {"Content-Type": "application/json"}
        too_large = client.post(route, content=bytes(24_000_001), headers=headers)
        assert too_large.status_code == 413
        assert too_large.json()["error"]["code"] == "payload_too_large"


def test_the_limits_of_the_proxies_are_above_those_of_the_server() -> None:
    nginx = (CONFIGS / "nginx/hypergen.conf").read_text(encoding="utf-8")
    caddy = (CONFIGS / "caddy/Caddyfile").read_text(encoding="utf-8")
    assert ServerSettings.model_fields["max_body_mb"].default * 1e6 < 25 * 2**20
    assert "client_max_body_size 25m;" in nginx
    assert QueueSettings.model_fields["request_timeout_s"].default < 3660
    assert "proxy_read_timeout 3660s;" in nginx
    assert "response_header_timeout 3660s" in caddy
    assert ServerSettings.model_fields["keep_alive_s"].default > 60
    assert "keepalive_timeout 60s;" in nginx
    assert "keepalive 60s" in caddy


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = replace_once(
        (CONFIGS / "systemd/hypergen.service").read_text(encoding="utf-8"),
        {"/opt/hypergen/bin/hypergen serve": "/bin/true"},
    )
    file = tmp_path / "hypergen.service"
    file.write_text(unit)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(file)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
