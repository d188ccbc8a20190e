"""Timeouts and limits of connections, on a uvicorn server per test."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import socket
import time
import weakref
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from hypergen.api.api_keys import ApiKeys
from hypergen.api.http_protocol import GuardedProtocol
from hypergen.api.middleware import OuterMiddleware
from hypergen.config import Settings
from tests.api.conftest import TightServer
from tests.support.live_server import LiveServer

HALF_HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\n"
MEGABYTES = 32  # more than the buffers of both sides


class ShortTimeouts(GuardedProtocol):
    """The same with short timeouts."""

    head_timeout_s = 0.5
    write_timeout_s = 0.5
    check_interval_s = 0.1
    max_connections = 5


async def _respond(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond with as many megabytes as the path says."""
    megabytes = int(scope["path"].strip("/") or 0)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(megabytes):
        await send({"type": "http.response.body", "body": b"a" * 1_000_000, "more_body": True})
    await send({"type": "http.response.body"})


@asynccontextmanager
async def _server(
    protocol: type[GuardedProtocol] = ShortTimeouts, app: ASGIApp = _respond
) -> AsyncGenerator[tuple[uvicorn.Server, int], None]:
    config = uvicorn.Config(app, port=0, log_config=None, lifespan="off", http=protocol)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110  uvicorn has no event for it
        await asyncio.sleep(0.01)
    try:
        yield server, server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


async def _until_closed(reader: asyncio.StreamReader) -> bytes:
    """The bytes until the connection is closed."""
    async with asyncio.timeout(20):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


@pytest.mark.parametrize("sent", [b"", HALF_HEAD], ids=["nothing", "half a head"])
async def test_a_connection_with_an_incomplete_head_is_closed(sent: bytes) -> None:
    async with _server() as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        assert await _until_closed(reader) == b""
        writer.close()


async def test_a_connection_that_sends_its_head_byte_by_byte_is_closed() -> None:
    async with _server() as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def send_slowly() -> None:
            for byte in HALF_HEAD * 1000:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.05)

        sending = asyncio.create_task(send_slowly())
        assert await _until_closed(reader) == b""
        sending.cancel()
        writer.close()


async def test_a_connection_with_an_incomplete_second_head_is_closed() -> None:
    async with _server() as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.write(HALF_HEAD)
        await _until_closed(reader)
        writer.close()


async def test_a_connection_stays_open_between_requests_for_its_keep_alive_time() -> None:
    """Which may be longer than the timeout of a head."""

    class LongKeepAlive(ShortTimeouts):
        keep_alive_s = 1.5

    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    async with _server(LongKeepAlive) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(request)
            assert (await reader.readuntil(b"0\r\n\r\n")).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(2 * LongKeepAlive.head_timeout_s)
        answered = asyncio.get_running_loop().time() - 2 * LongKeepAlive.head_timeout_s
        assert await _until_closed(reader) == b""
        assert 1.4 < asyncio.get_running_loop().time() - answered < 5
        writer.close()


def _open_after(server: LiveServer, idle_s: float) -> bool:
    """Whether the server still answers on a connection that was idle for so long after a response."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    connection.request("GET", "/livez")
    connection.getresponse().read()
    connection.auto_open = 0
    time.sleep(idle_s)
    try:
        connection.request("GET", "/livez")
        return connection.getresponse().status == 200
    except ConnectionError:
        return False
    finally:
        connection.close()


def test_the_setting_is_the_keep_alive_time_of_the_server(server: LiveServer, tight: TightServer) -> None:
    """By default longer than uvicorn's 5 s."""
    assert _open_after(server, 6)
    assert _open_after(tight.server, 1)
    assert not _open_after(tight.server, 4)


async def test_a_client_that_does_not_read_its_response_is_disconnected() -> None:
    async with _server() as (server, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % MEGABYTES)
        async with asyncio.timeout(20):
            while not server.server_state.connections:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            while server.server_state.connections or server.server_state.tasks:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        writer.transport.abort()


async def test_a_response_in_one_chunk_ends_at_the_deadline_of_its_request() -> None:
    """BentoML's routes send one chunk; a client that reads a little at a time does not stall."""
    settings = Settings.model_validate({"queue": {"request_timeout_s": 0.5}})
    app = OuterMiddleware(Response(bytes(MEGABYTES * 1_000_000)), ApiKeys(settings.server), settings)
    async with _server(GuardedProtocol, app) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert await reader.read(12) == b"HTTP/1.1 200"
        async with asyncio.timeout(20):
            while server.server_state.connections or server.server_state.tasks:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        writer.transport.abort()


async def test_a_response_in_one_chunk_is_complete() -> None:
    settings = Settings.model_validate({})
    app = OuterMiddleware(Response(bytes(range(256)) * 100_000), ApiKeys(settings.server), settings)
    async with _server(GuardedProtocol, app) as (_, port), httpx.AsyncClient() as client:
        assert (await client.get(f"http://127.0.0.1:{port}/")).content == bytes(range(256)) * 100_000


async def test_a_slow_client_gets_its_complete_response() -> None:
    """Reading takes ten times the write timeout."""
    async with _server() as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(b"GET /%d HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % MEGABYTES)
        received = 0
        while data := await reader.read(MEGABYTES * 1_000_000 // 50):
            received += len(data)
            await asyncio.sleep(0.002)
        assert received > MEGABYTES * 1_000_000
        writer.close()


async def test_beyond_the_limit_the_connection_that_is_idle_longest_is_closed() -> None:
    class FiveConnections(GuardedProtocol):
        max_connections = 5

    async with _server(FiveConnections) as (server, port):
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
        busy_reader, busy = await asyncio.open_connection("127.0.0.1", port, limit=1)
        busy.write(b"GET /%d HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % MEGABYTES)
        await busy_reader.read(1)
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"http://127.0.0.1:{port}/")).status_code == 200
            assert await _until_closed(idle[0][0]) == b""
            assert len(server.server_state.connections) == 5
        assert len(await busy_reader.read(1_000_000)) > 0  # the running response continues
        for _, writer in (*idle, (busy_reader, busy)):
            writer.transport.abort()


async def test_websockets_do_not_break_the_connection_limit() -> None:
    class TwoConnections(GuardedProtocol):
        max_connections = 2

    async with _server(TwoConnections) as (server, port):
        writers: list[asyncio.StreamWriter] = []
        for _ in range(6):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n")
            writer.write(b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eHh4eHh4eHh4eHh4eHh4eA==\r\n\r\n")
            writers.append(writer)
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"http://127.0.0.1:{port}/")).status_code == 200
        assert server.server_state.total_requests >= 1
        for writer in writers:
            writer.transport.abort()


async def test_a_closed_connection_is_freed_at_once() -> None:
    protocols: list[weakref.ref[GuardedProtocol]] = []

    class TrackedProtocol(GuardedProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
            protocols.append(weakref.ref(self))
            super().connection_made(transport)

    gc.disable()
    try:
        async with _server(TrackedProtocol) as (server, port):
            async with httpx.AsyncClient() as client:
                assert (await client.get(f"http://127.0.0.1:{port}/")).status_code == 200
            async with asyncio.timeout(20):
                while server.server_state.connections:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            assert [reference() for reference in protocols] == [None]
    finally:
        gc.enable()


CHUNKED = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED += "Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("size", ["F" * 16, "F" * 20, "F" * 40, "80001000", "-1", "0x10", "1 1", ""])
def test_a_chunk_size_that_overflows_is_rejected_at_once(server: LiveServer, size: str) -> None:
    """The timeout of the body is 30 s."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"{CHUNKED}{size}\r\nabc".encode())
        response = b""
        while data := connection.recv(65536):
            response += data
    head, _, body = response.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert b"x-content-type-options: nosniff" in head
    assert json.loads(body)["error"]["code"] == "invalid_http"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system has no /proc")
def test_the_connection_limit_is_below_the_descriptor_limit() -> None:
    assert GuardedProtocol.max_connections < 1_000_000
    assert GuardedProtocol.max_connections >= 16


def _send_endless_chunks(server: LiveServer, path: str, size: int) -> bytes:
    """The response to this many bytes of a chunked body without end."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(CHUNKED.replace("/v1/images/generations", path).encode())
        for _ in range(size // 1000):
            connection.sendall(b"3e8\r\n" + b"a" * 1000 + b"\r\n")
        return connection.recv(65536)


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/edits", "/generate"])
def test_a_chunked_body_is_rejected_as_soon_as_it_exceeds_the_limit(server: LiveServer, path: str) -> None:
    """The limit is 1 MB for bodies without input images, also on routes that accept them."""
    assert _send_endless_chunks(server, path, 1_001_000).startswith(b"HTTP/1.1 413")


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond before the body has arrived, and close the connection."""
    response = Response("too large", 413, {"Connection": "close"})
    await response(scope, receive, send)


@pytest.mark.parametrize("body", ["announced", "in chunks", "with a damaged chunk"])
async def test_a_client_that_is_refused_early_can_send_its_body_and_read_the_response(body: str) -> None:
    """To close at once would reset the connection, and the client would lose the response."""
    head = {"announced": b"Content-Length: %d" % (MEGABYTES * 1_000_000)}.get(
        body, b"Transfer-Encoding: chunked"
    )
    app = _accept if body == "with a damaged chunk" else _refuse
    async with _server(GuardedProtocol, app) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
        for number in range(MEGABYTES):
            chunk = b"a" * 1_000_000
            size = b"x" if (body, number) == ("with a damaged chunk", 1) else b"%x" % len(chunk)
            writer.write(chunk if body == "announced" else size + b"\r\n" + chunk + b"\r\n")
            await writer.drain()
        response = await _until_closed(reader)
        status = b"400" if body == "with a damaged chunk" else b"413"
        assert response.startswith(b"HTTP/1.1 " + status)
        assert response.endswith(b"too large" if status == b"413" else b"}")
        writer.close()
        async with asyncio.timeout(20):
            while server.server_state.connections:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def _accept(scope: Scope, receive: Receive, send: Send) -> None:
    """Read the whole body."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        if not message.get("more_body"):
            break
    await Response("read")(scope, receive, send)


async def test_a_client_that_never_ends_its_refused_body_is_closed() -> None:
    class ShortDrain(ShortTimeouts):
        drain_timeout_s = 0.5

    async with _server(ShortDrain, _refuse) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert (await _until_closed(reader)).endswith(b"too large")
        async with asyncio.timeout(20):
            while server.server_state.connections:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        writer.close()
