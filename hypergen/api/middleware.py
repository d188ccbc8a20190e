"""The outermost middleware: every request gets an id and a deadline, shows its key, stays within the limits
of bodies, and when it fails gets the one error body, also where BentoML's own routes would answer otherwise.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, cast

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hypergen.api import errors
from hypergen.api.auth import OPEN_PATHS, BearerAuth
from hypergen.api.hosts import refuse_strangers
from hypergen.api.http_protocol import ABORT
from hypergen.api.outgoing_answers import Outgoing, OutgoingMemory
from hypergen.api.request_body import BodyLimit, BodyMemory
from hypergen.api.responses import SLICE_BYTES, iter_chunks
from hypergen.config import Settings
from hypergen.errors import DeadlineExceededError, RequestError

logger = logging.getLogger(__name__)

# BentoML's name and version are nobody's business.
_HIDDEN_HEADERS = ("server", "x-bentoml-request-id")


class OuterMiddleware:
    """Pure ASGI, because a middleware of another kind breaks streams and hides disconnects.

    Puts into the request's state its `request_id`, its `deadline` (by the loop's clock), its `body`
    (`BodyLimit`) and what it has `outgoing`.
    """

    # What is being done when the deadline passes gets this long to say so itself.
    _GRACE_S = 1.0

    def __init__(self, app: ASGIApp, keys: Sequence[str], settings: Settings) -> None:
        self._app = app
        self._auth = BearerAuth(keys)
        self._keyed = bool(keys)
        self._server = settings.server
        self._max_body_bytes = int(settings.server.max_body_mb * 1e6)
        self._timeout_s = settings.queue.request_timeout_s
        memory_bytes = settings.queue.max_input_image_mb * 1e6
        self._bodies = BodyMemory(memory_bytes)
        self._outgoing = OutgoingMemory(memory_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # no route speaks WebSocket
            return await send({"type": "websocket.close", "code": 1008})
        request_id = f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        limit = BodyLimit(scope, receive, self._max_body_bytes, self._bodies)
        timeout = asyncio.timeout_at(deadline + self._GRACE_S)

        def cut() -> None:
            with suppress(RuntimeError):  # the answer has ended in this moment
                timeout.reschedule(loop.time())

        outgoing = self._outgoing.open(cut)
        scope["state"] |= {"deadline": deadline, "body": limit, "outgoing": outgoing}
        answer = _Answer(scope, send, limit, outgoing)
        try:
            self._auth.check(scope["method"], scope["path"], scope["headers"])
            if not self._keyed:
                refuse_strangers(scope["method"], scope["path"], scope["headers"], self._server)
            if limit.error:
                raise limit.error
            async with timeout:
                await self._app(scope, limit.receive, answer.send)
        except errors.ClientGoneError:
            if not answer.started:
                await answer.client_left()
        except Exception as error:  # the outer edge of the HTTP half
            if timeout.expired() and isinstance(error, TimeoutError):
                error = _too_late()
            elif not isinstance(error, RequestError):
                logger.exception("%s failed.", request_id)
            if not answer.started:
                await answer.replace(scope, receive, error)
            elif not timeout.expired() or not await self._abort(scope, request_id):
                raise error
        finally:
            limit.release()
            self._outgoing.close(outgoing)
            answer.log()

    async def _abort(self, scope: Scope, request_id: str) -> bool:
        """End the connection of an answer that has begun and cannot be finished; False where nothing can."""
        abort = scope.get("extensions", {}).get(ABORT)
        if abort is None:
            return False
        logger.warning("%s: the connection is closed, its answer was not taken or not finished.", request_id)
        abort()
        await asyncio.sleep(0)  # lets the server see it, which would else miss the end of the answer
        return True


class _Answer:
    """One response on its way out: gets its headers, and its body too if it is an error in another shape."""

    def __init__(self, scope: Scope, send: Send, limit: BodyLimit, outgoing: Outgoing) -> None:
        self._scope = scope
        self._send = send
        self._limit = limit
        self._outgoing = outgoing
        self._request_id: str = scope["state"]["request_id"]
        self._arrived = time.monotonic()
        self._status = 0
        self._held: Message | None = None  # the start of an error response, until its body was seen
        self._body = b""
        self.started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            if self._status >= 400:
                self._held = message
                return
            await self._start(message)
        elif self._held is None:
            await self._send_body(message.get("body", b""), message.get("more_body", False))
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._send_error(self._held)

    async def _send_body(self, body: bytes, more_body: bool) -> None:
        """In slices that a slow client can be waited for between: BentoML's routes answer in one piece."""
        size = len(body)
        if size > SLICE_BYTES:
            self._outgoing.hold(size)
            async for piece in iter_chunks([body]):
                size -= len(piece)
                if size:
                    await self._send({"type": "http.response.body", "body": piece, "more_body": True})
                    self._outgoing.moved()
                else:
                    body = piece
        await self._send({"type": "http.response.body", "body": body, "more_body": more_body})
        self._outgoing.moved()

    async def replace(self, scope: Scope, receive: Receive, error: Exception) -> None:
        """Answer an exception that nobody answered."""
        self._held, self._body = None, b""
        if not isinstance(error, RequestError):
            body = errors.envelope(500, "The server failed on this request; its log says why.")
            await errors.json_response(body, 500)(scope, receive, self.send)
        else:
            await errors.to_response(error)(scope, receive, self.send)

    async def _start(self, message: Message) -> None:
        self.started = True
        headers = MutableHeaders(raw=message["headers"])
        for name in _HIDDEN_HEADERS:
            if name in headers:
                del headers[name]
        headers["x-request-id"] = self._request_id
        headers["x-content-type-options"] = "nosniff"
        await self._send(message)

    async def _send_error(self, start: Message) -> None:
        self._held = None
        body = self._body
        error = self._limit.error
        late = asyncio.get_running_loop().time() >= self._scope["state"]["deadline"]
        if late and start["status"] >= 500:  # BentoML answers what it cancelled in its own way
            await self._answer_instead(errors.to_response(_too_late()))
            return
        # A stranger learns of the key first.
        if error and start["status"] not in (401, errors.status_of(error)):
            await self._answer_instead(errors.to_response(error))
            return
        is_probe = self._scope["path"] in OPEN_PATHS  # these tell a state, not an error
        if not _has_our_shape(body) and not is_probe and self._scope["method"] != "HEAD":
            await self._answer_instead(_in_our_shape(start["status"], body))
            return
        await self._start(start)
        await self._send({"type": "http.response.body", "body": body})

    async def _answer_instead(self, response: Response) -> None:
        self._status = response.status_code
        await self._start(
            {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        )
        await self._send({"type": "http.response.body", "body": response.body})

    async def client_left(self) -> None:
        """Nobody reads it, but BentoML waits for an answer."""
        await self._answer_instead(Response(status_code=errors.CLIENT_GONE))

    def log(self) -> None:
        if self._scope["path"] in OPEN_PATHS:  # probes come every few seconds
            return
        # Escaped: a path may hold line feeds and terminal codes, and must not forge a line of the log.
        path = self._scope["path"].encode("unicode_escape").decode("ascii")[:200]
        milliseconds = (time.monotonic() - self._arrived) * 1000
        logger.info(
            "%s %s %d %.0f ms %s", self._scope["method"], path, self._status, milliseconds, self._request_id
        )


def _too_late() -> DeadlineExceededError:
    return DeadlineExceededError("The request was not finished within its time.")


def _has_our_shape(body: bytes) -> bool:
    try:
        return isinstance(json.loads(body)["error"]["message"], str)
    except (ValueError, TypeError, KeyError):
        return False


def _in_our_shape(status: int, body: bytes) -> Response:
    """What BentoML says, as far as it is meant for clients, in the one error body."""
    message = {404: "Not found.", 405: "Method not allowed."}.get(status, "The request was refused.")
    with suppress(ValueError, LookupError, TypeError):
        said: Any = json.loads(body)
        if isinstance(said, list):
            said = cast(list[Any], said)[0]
        message = said["error"] if isinstance(said["error"], str) else message
        first: Any = said["detail"][0]  # pydantic's; the line before names only its internal class
        message = f"{'.'.join(map(str, first['loc'])) or 'The body'}: {first['msg']}."
    if status >= 500:
        message = "The server failed on this request; its log says why."
    return errors.json_response(errors.envelope(status, message), status)
