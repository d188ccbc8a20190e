"""uvicorn's HTTP/1.1 protocol with limits for slow and many connections, for which uvicorn has no settings.

The limits are a time for a request's head, a time in which the client must read, and a number of connections.
`bentoml_integration/dispatcher.py` selects this protocol.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import Any, ClassVar, cast

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from hypergen.api.errors import envelope, to_json

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None

# No client sends larger chunks. A size that overflows in a proxy may smuggle a second request.
_MAX_CHUNK_BYTES = 2**31
_MAX_CONNECTIONS = 10_000
# h11 takes 1 us per byte for a body in chunks of one byte; asyncio reads 256 kB at a time by default.
_READ_BYTES = 16 * 1024
# Key in `scope["extensions"]`: a function that closes the connection at once and drops unsent bytes.
ABORT = "hypergen.abort"


def _default_max_connections() -> int:
    """The file descriptor limit without the descriptors that the process itself needs."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else -1
    if descriptors < 0:  # no limit
        return _MAX_CONNECTIONS
    return min(_MAX_CONNECTIONS, max(16, descriptors - min(128, descriptors // 4)))


class _LingeringTransport:
    """A transport whose `close` waits for the rest of a request's body.

    To close a socket with unread bytes resets the connection, and the client loses the unread part of its
    response. nginx calls the wait a lingering close.
    """

    def __init__(self, transport: asyncio.Transport, protocol: GuardedProtocol) -> None:
        self._transport = transport
        self._protocol = protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        if self._protocol.begin_lingering():
            if self._transport.can_write_eof():  # not with TLS
                self._transport.write_eof()
            self._transport.resume_reading()
        else:
            self._transport.close()


class GuardedProtocol(H11Protocol):
    """One connection, with timeouts that are checked every `check_interval_s`.

    Attributes:
        keep_alive_s: from a response to the first byte of the next request.
        head_timeout_s: from the connection, or the first byte of a later request, to the end of its head.
        write_timeout_s: how long a client may read nothing of its response.
        drain_timeout_s: how long a client may send the rest of its body after an early response, with or
            without `Connection: close`.
        max_connections: beyond this number the connection that has been idle longest is closed.
    """

    keep_alive_s: ClassVar[float] = 75.0
    head_timeout_s = 20.0
    write_timeout_s = 60.0
    check_interval_s = 5.0
    drain_timeout_s = 120.0
    max_connections = _default_max_connections()

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.timeout_keep_alive = cast(int, self.keep_alive_s)  # uvicorn passes it to `loop.call_later`
        self.idle_since = self.loop.time()
        self._head_since: float | None = self.idle_since  # None: no byte of the next request has arrived
        self._unsent_bytes = 0
        self._progress_at = self.idle_since
        self._timer: asyncio.TimerHandle | None = None
        self._lingers = False
        app = self.app

        async def with_abort(scope: Scope, receive: Receive, send: Send) -> None:
            scope["extensions"] = {**scope.get("extensions", {}), ABORT: self.transport.abort}
            await app(cast(Any, scope), cast(Any, receive), cast(Any, send))

        self.app = cast(Any, with_abort)

    @property
    def idle(self) -> bool:
        """Whether no request is in progress."""
        return self.cycle is None or self.cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self.transport = cast(asyncio.Transport, _LingeringTransport(transport, weakref.proxy(self)))
        if hasattr(transport, "max_size"):  # asyncio's own
            transport.max_size = _READ_BYTES  # pyright: ignore[reportAttributeAccessIssue]
        self._timer = self.loop.call_later(self.check_interval_s, self._check_timeouts)
        self._enforce_connection_limit()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)
        self.app = cast(Any, None)  # breaks a reference cycle, so that the memory is freed at once

    def begin_lingering(self) -> bool:
        """Whether the connection stays open to receive and discard the rest of a body; once only."""
        body_is_complete = self.conn.their_state not in (h11.SEND_BODY, h11.ERROR)
        if self._lingers or body_is_complete or not self.idle:
            return False
        self._lingers = True
        return True

    def shutdown(self) -> None:
        self._lingers = True  # `close` closes at once
        super().shutdown()

    def data_received(self, data: bytes) -> None:
        if self._lingers and self.idle:
            self._unset_keepalive_if_required()
            return
        if self._head_since is None:
            self._head_since = self.loop.time()
        super().data_received(data)
        reader = self.conn._reader  # pyright: ignore[reportPrivateUsage]  h11 does not expose the chunk size
        if getattr(reader, "_bytes_in_chunk", 0) > _MAX_CHUNK_BYTES:
            self.send_400_response("A chunk of the body is larger than 2 GiB.")

    def send_400_response(self, msg: str) -> None:
        """Send the error body for malformed HTTP. If the response has started, only close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = to_json(envelope(400, msg, code="invalid_http"))
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            headers += [(b"content-length", b"%d" % len(body)), (b"x-content-type-options", b"nosniff")]
            response = (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            for event in response:
                self.transport.write(self.conn.send(event) or b"")
        if not self.idle:  # the application has lost its client, as in `connection_lost`
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self.cycle = cast(Any, None)
        self.transport.close()

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        self._head_since = None
        super().on_response_complete()

    def resume_writing(self) -> None:
        self._progress_at = self.loop.time()
        super().resume_writing()

    def _check_timeouts(self) -> None:
        now = self.loop.time()
        if self.transport.get_protocol() is not self:  # a WebSocket, which the middleware rejects
            return
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or unsent < self._unsent_bytes:
            self._progress_at = now
        self._unsent_bytes = unsent
        if now - self._progress_at >= self.write_timeout_s:
            self.transport.abort()
            return
        if self.conn.their_state is h11.IDLE:
            since, timeout_s = self._head_since, self.head_timeout_s
        else:
            since, timeout_s = self.idle_since, self.drain_timeout_s
        if self.idle and since is not None and now - since >= timeout_s:
            self._lingers = True
            self.transport.close()
        self._timer = self.loop.call_later(self.check_interval_s, self._check_timeouts)

    def _enforce_connection_limit(self) -> None:
        """Beyond the limit, close the connection that has been idle longest, or this one if none is idle."""
        if len(self.connections) <= self.max_connections:
            return
        connections = cast(set[Any], self.connections)  # also WebSockets, which are rejected at once
        guarded = (connection for connection in connections if isinstance(connection, GuardedProtocol))
        open_connections = [connection for connection in guarded if not connection.transport.is_closing()]
        if len(open_connections) <= self.max_connections:
            return
        idle = (connection for connection in open_connections if connection.idle and connection is not self)
        min(idle, key=lambda connection: connection.idle_since, default=self).transport.abort()
