"""uvicorn's HTTP/1.1 protocol with limits on what a connection may cost: time for a request's head, time
without a byte of an answer taken, and a number of connections.

uvicorn has no settings for these. The
service's `bentoml_integration/dispatcher.py` chooses it.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from hypergen.api.errors import envelope, to_json

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None

# No client sends such chunks; a size that wraps around in a proxy before us may hide a second request.
_MAX_CHUNK_BYTES = 2**31
_MOST_CONNECTIONS = 10_000
# h11 takes a microsecond for each byte of a body in chunks of one, and reads are 256 kB by default.
_READ_BYTES = 16 * 1024
# In `scope["extensions"]`: ends the connection at once; what was not sent is dropped.
ABORT = "hypergen.abort"


def _connections_that_fit() -> int:
    """How many connections there may be beside the files and sockets that the process itself needs."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else -1
    if descriptors < 0:  # no limit
        return _MOST_CONNECTIONS
    return min(_MOST_CONNECTIONS, max(16, descriptors - min(128, descriptors // 4)))


class GuardedProtocol(H11Protocol):
    """One connection, which is looked at every now and then: does it still move?

    Attributes:
        head_timeout_s: from the connection, or the answer before, to the end of a request's head.
        write_timeout_s: in which a client takes no byte of its answer.
        drain_timeout_s: in which a client that was answered early may send the rest of its body.
        max_connections: beyond so many, the one that has waited longest for a request is ended.
    """

    head_timeout_s = 20.0
    write_timeout_s = 60.0
    look_every_s = 5.0
    drain_timeout_s = 120.0
    max_connections = _connections_that_fit()

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.waiting_since = self.loop.time()  # for a request's head
        self._unsent = 0
        self._sent_at = self.waiting_since
        self._look: asyncio.TimerHandle | None = None
        app = self.app

        async def with_abort(scope: Scope, receive: Receive, send: Send) -> None:
            scope["extensions"] = {**scope.get("extensions", {}), ABORT: self.transport.abort}
            await app(cast(Any, scope), cast(Any, receive), cast(Any, send))

        self.app = cast(Any, with_abort)

    @property
    def idle(self) -> bool:
        """Whether no request is being received or answered."""
        return self.cycle is None or self.cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        if hasattr(transport, "max_size"):  # asyncio's own
            transport.max_size = _READ_BYTES  # pyright: ignore[reportAttributeAccessIssue]
        self._look = self.loop.call_later(self.look_every_s, self._look_again)
        self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)
        self.app = cast(Any, None)  # breaks a cycle, so that all of it goes with the connection

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        reader = self.conn._reader  # pyright: ignore[reportPrivateUsage]  h11 does not tell a chunk's size
        if getattr(reader, "_bytes_in_chunk", 0) > _MAX_CHUNK_BYTES:
            self.send_400_response("The body has a chunk of more than 2 GiB.")

    def send_400_response(self, msg: str) -> None:
        """The one error body, for what is no HTTP. A connection whose answer has begun is only closed."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = to_json(envelope(400, msg, code="invalid_http"))
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            headers += [(b"content-length", b"%d" % len(body)), (b"x-content-type-options", b"nosniff")]
            answer = (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            for event in answer:
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def on_response_complete(self) -> None:
        self.waiting_since = self.loop.time()
        super().on_response_complete()

    def resume_writing(self) -> None:
        self._sent_at = self.loop.time()
        super().resume_writing()

    def _look_again(self) -> None:
        now = self.loop.time()
        if self.transport.get_protocol() is not self:  # a WebSocket, which the service refuses by itself
            return
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or unsent < self._unsent:
            self._sent_at = now
        self._unsent = unsent
        if now - self._sent_at >= self.write_timeout_s:
            self.transport.abort()
            return
        timeout_s = self.head_timeout_s if self.conn.their_state is h11.IDLE else self.drain_timeout_s
        if self.idle and now - self.waiting_since >= timeout_s:
            self.transport.close()
        self._look = self.loop.call_later(self.look_every_s, self._look_again)

    def _make_room(self) -> None:
        """End the connection that has waited longest for a request when there are too many; without such a
        one, the new connection.
        """
        if len(self.connections) <= self.max_connections:
            return
        connections = cast(set[Any], self.connections)  # WebSockets too, which are refused at once
        there = [c for c in connections if isinstance(c, GuardedProtocol) and not c.transport.is_closing()]
        if len(there) <= self.max_connections:
            return
        idle = (connection for connection in there if connection.idle and connection is not self)
        min(idle, key=lambda connection: connection.waiting_since, default=self).transport.abort()
