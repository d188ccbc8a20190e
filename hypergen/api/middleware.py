"""The outermost middleware: request id, deadline, CORS, key check, body limits, and the error body.

It also covers BentoML's own routes, whose errors it rewrites into the error body.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hypergen.api import errors
from hypergen.api.api_keys import ApiKeys
from hypergen.api.auth import OPEN_PATHS, BearerAuth
from hypergen.api.cors import Cors
from hypergen.api.hosts import reject_cross_site
from hypergen.api.http_protocol import ABORT
from hypergen.api.outgoing_answers import OutgoingMemory, OutgoingResponse
from hypergen.api.request_body import BodyLimit, BodyMemory
from hypergen.api.request_record import RequestRecord
from hypergen.api.responses import CHUNK_BYTES, iter_chunks
from hypergen.config import Settings
from hypergen.errors import DeadlineExceededError, RequestError
from hypergen.request import ANONYMOUS

logger = logging.getLogger(__name__)

# These would reveal BentoML and its version.
_HIDDEN_HEADERS = ("server", "x-bentoml-request-id")


class OuterMiddleware:
    """Pure ASGI, because Starlette's `BaseHTTPMiddleware` breaks streams and hides disconnects.

    It sets in the request's state: `request_id`, `deadline` (of the event loop's clock), `api_key`,
    `authenticated` (False for a request without a key, where the server has keys), `body` (`BodyLimit`),
    `outgoing` (`OutgoingResponse`) and `record` (`RequestRecord`).

    Args:
        tracing: returns a function that is called with the record of each request at its end; None: tracing
            is off. Called here, because the service is declared before BentoML has its configuration.
    """

    # Time after the deadline in which the handler can raise its own DeadlineExceededError.
    _GRACE_S = 1.0

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys,
        settings: Settings,
        tracing: Callable[[], Callable[[RequestRecord], None] | None] = lambda: None,
    ) -> None:
        self._app = app
        self._trace = tracing()
        self._auth = BearerAuth(keys)
        self._keyed = bool(keys)
        self._cors = Cors(app, settings.server.cors_origin)
        self._server = settings.server
        self._max_body_bytes = int(settings.server.max_body_mb * 1e6)
        self._timeout_s = settings.queue.request_timeout_s
        memory_bytes = settings.queue.max_input_image_mb * 1e6
        self._bodies = BodyMemory(memory_bytes)
        self._outgoing = OutgoingMemory(memory_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # no route supports WebSockets
            return await send({"type": "websocket.close", "code": 1008})
        request_id = f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        limit = BodyLimit(scope, receive, self._max_body_bytes, self._bodies)
        timeout = asyncio.timeout_at(deadline + self._GRACE_S)

        def abort() -> None:
            with suppress(RuntimeError):  # the timeout has already ended
                timeout.reschedule(loop.time())

        outgoing = self._outgoing.open(abort)
        scope["state"] |= {"deadline": deadline, "body": limit, "outgoing": outgoing}
        record = RequestRecord.of(scope, request_id, self._trace)
        scope["state"]["record"] = record
        preflight = self._cors.preflight(scope)
        if preflight is None:
            send = self._cors.with_headers(scope, send)
        response = _Response(scope, send, limit, outgoing, record)
        try:
            if preflight is None:
                key = self._auth.check(scope["method"], scope["path"], scope["headers"])
                scope["state"]["api_key"] = record.api_key = key
                scope["state"]["authenticated"] = not self._keyed or key is not ANONYMOUS
            if not self._keyed:
                allowed = self._cors.allows(scope)
                reject_cross_site(scope["method"], scope["path"], scope["headers"], self._server, allowed)
            if preflight is not None:
                return await preflight(scope, receive, response.send)
            if limit.error:
                raise limit.error
            async with timeout:
                await self._app(scope, limit.receive, response.send)
        except errors.ClientDisconnectedError:
            record.disconnect()
            if not response.started:
                await response.send_client_closed_request()
        except Exception as error:  # Isolate the failure: only this request fails.
            if timeout.expired() and isinstance(error, TimeoutError):
                error = _deadline_exceeded()
            elif not isinstance(error, RequestError):
                logger.exception("%s failed.", request_id)
            if not response.started:
                await response.send_exception(scope, receive, error)
            else:
                record.fail(error)
                if not timeout.expired() or not await self._abort_connection(scope, request_id):
                    raise error
        finally:
            limit.release()
            self._outgoing.close(outgoing)
            record.finish()

    async def _abort_connection(self, scope: Scope, request_id: str) -> bool:
        """Close the connection of an unfinished response; False if the server does not support it."""
        abort = scope.get("extensions", {}).get(ABORT)
        if abort is None:
            return False
        logger.warning(
            "%s: closed the connection; the response was not finished, or the client did not read it.",
            request_id,
        )
        abort()
        await asyncio.sleep(0)  # until uvicorn has seen the disconnect, or it reports an unfinished response
        return True


class _Response:
    """One response: adds headers, and replaces error bodies that do not have our format."""

    def __init__(
        self, scope: Scope, send: Send, limit: BodyLimit, outgoing: OutgoingResponse, record: RequestRecord
    ) -> None:
        self._scope = scope
        self._send = send
        self._limit = limit
        self._outgoing = outgoing
        self._record = record
        self._error_start: Message | None = None  # of an error response, until its body is complete
        self._body = b""
        self.started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            if message["status"] >= 400:
                self._error_start = message
                return
            await self._start(message)
        elif self._error_start is None:
            await self._send_body(message.get("body", b""), message.get("more_body", False))
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._send_error(self._error_start)

    async def _send_body(self, body: bytes, more_body: bool) -> None:
        """Send a body in chunks, which shows the progress of a slow client; BentoML sends one large chunk."""
        size = len(body)
        if size > CHUNK_BYTES:
            self._outgoing.add_pending(size)
            async for piece in iter_chunks([body]):
                size -= len(piece)
                if size:
                    await self._send({"type": "http.response.body", "body": piece, "more_body": True})
                    self._outgoing.record_progress()
                else:
                    body = piece
        await self._send({"type": "http.response.body", "body": body, "more_body": more_body})
        self._outgoing.record_progress()

    async def send_exception(self, scope: Scope, receive: Receive, error: Exception) -> None:
        """Respond to an exception that no handler caught."""
        self._error_start, self._body = None, b""
        if not isinstance(error, RequestError):
            body = errors.envelope(500, "The server failed on this request; see its log.")
            await errors.json_response(body, 500)(scope, receive, self.send)
        else:
            await errors.to_response(error)(scope, receive, self.send)

    async def _start(self, message: Message) -> None:
        self.started = True
        headers = MutableHeaders(raw=message["headers"])
        for name in _HIDDEN_HEADERS:
            if name in headers:
                del headers[name]
        headers["x-request-id"] = self._record.request_id
        headers["x-content-type-options"] = "nosniff"
        await self._send(message)

    async def _send_error(self, start: Message) -> None:
        self._error_start = None
        body = self._body
        error = self._limit.error
        late = asyncio.get_running_loop().time() >= self._scope["state"]["deadline"]
        if late and start["status"] >= 500:  # BentoML's own error for a cancelled request
            await self._send_instead(errors.to_response(_deadline_exceeded()))
            return
        # A 401 takes precedence over the error of the body.
        if error and start["status"] not in (401, errors.status_of(error)):
            await self._send_instead(errors.to_response(error))
            return
        is_probe = self._scope["path"] in OPEN_PATHS  # their 503 is a state, not an error
        error_fields = _error_fields(body)
        if error_fields is None and not is_probe and self._scope["method"] != "HEAD":
            await self._send_instead(_to_error_response(start["status"], body))
            return
        self._record.set_error(error_fields or {})
        await self._start(start)
        await self._send({"type": "http.response.body", "body": body})

    async def _send_instead(self, response: Response) -> None:
        self._record.status = response.status_code
        self._record.set_error(_error_fields(bytes(response.body)) or {})
        await self._start(
            {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        )
        await self._send({"type": "http.response.body", "body": response.body})

    async def send_client_closed_request(self) -> None:
        """A status for the log; BentoML also waits for a response."""
        await self._send_instead(Response(status_code=errors.CLIENT_CLOSED_REQUEST))


def _deadline_exceeded() -> DeadlineExceededError:
    return DeadlineExceededError("The request did not finish before its deadline.")


def _error_fields(body: bytes) -> dict[str, Any] | None:
    """The error in a body of our format; None: it has another."""
    try:
        error: dict[str, Any] = json.loads(body)["error"]
        return error if isinstance(error["message"], str) else None
    except (ValueError, TypeError, KeyError):
        return None


def _to_error_response(status: int, body: bytes) -> Response:
    """BentoML's error in our error body, as far as its message is meant for clients."""
    message = {404: "Not found.", 405: "Method not allowed."}.get(status, "The request was rejected.")
    with suppress(ValueError, LookupError, TypeError):
        content: Any = json.loads(body)
        if isinstance(content, list):
            content = cast(list[Any], content)[0]
        message = content["error"] if isinstance(content["error"], str) else message
        first: Any = content["detail"][0]  # pydantic's error; `error` names only its internal class
        message = f"{'.'.join(map(str, first['loc'])) or 'The body'}: {first['msg']}."
    if status >= 500:
        message = "The server failed on this request; see its log."
    return errors.json_response(errors.envelope(status, message), status)
