"""The outermost middleware: every request gets an id, shows its key, stays within the body limit, and when it
fails gets the one error body, also where BentoML's own routes would answer otherwise.
"""

from __future__ import annotations

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
from hypergen.api.limits import BodyLimit
from hypergen.errors import RequestError

logger = logging.getLogger(__name__)

# BentoML's name and version are nobody's business.
_HIDDEN_HEADERS = ("server", "x-bentoml-request-id")


class OuterMiddleware:
    """Pure ASGI, because a middleware of another kind breaks streams and hides disconnects."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], max_body_bytes: int) -> None:
        self._app = app
        self._auth = BearerAuth(keys)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # no route speaks WebSocket
            return await send({"type": "websocket.close", "code": 1008})
        request_id = f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        limit = BodyLimit(scope, receive, self._max_body_bytes)
        answer = _Answer(scope, send, limit, request_id)
        try:
            self._auth.check(scope["method"], scope["path"], scope["headers"])
            if limit.error:
                raise limit.error
            await self._app(scope, limit.receive, answer.send)
        except Exception as error:  # the outer edge of the HTTP half
            if not isinstance(error, RequestError):
                logger.exception("%s failed.", request_id)
            if answer.started:
                raise
            await answer.replace(scope, receive, error)
        finally:
            answer.log()


class _Answer:
    """One response on its way out: gets its headers, and its body too if it is an error in another shape."""

    def __init__(self, scope: Scope, send: Send, limit: BodyLimit, request_id: str) -> None:
        self._scope = scope
        self._send = send
        self._limit = limit
        self._request_id = request_id
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
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._send_error(self._held)

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
        await self._send(message)

    async def _send_error(self, start: Message) -> None:
        self._held = None
        body = self._body
        error = self._limit.error
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

    def log(self) -> None:
        if self._scope["path"] in OPEN_PATHS:  # probes come every few seconds
            return
        # Escaped: a path may hold line feeds and terminal codes, and must not forge a line of the log.
        path = self._scope["path"].encode("unicode_escape").decode("ascii")[:200]
        milliseconds = (time.monotonic() - self._arrived) * 1000
        logger.info(
            "%s %s %d %.0f ms %s", self._scope["method"], path, self._status, milliseconds, self._request_id
        )


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
