"""Streaming: pictures as server-sent events, with previews while they are drawn.

The answer starts when an engine has begun with the request: what is wrong before is a plain error with its
own status, what fails later is an event.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html and OpenAI's image streaming events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from hypergen.api.errors import error_body, to_json
from hypergen.api.outgoing_answers import Outgoing
from hypergen.api.responses import iter_chunks, write
from hypergen.engine_protocol import RequestHandle
from hypergen.errors import DeadlineExceededError, GenerationError, RequestError
from hypergen.events import Event, ImageFinished, Preview

# Proxies close connections that are silent for a minute.
_PING_S = 15.0
_PING = b": still drawing\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """The answer to a request that has begun. When the client leaves, the request is cancelled.

    Args:
        to_sse_event: an event as it is sent, in pieces; runs in a thread.
        outgoing: what holds the memory of the events that were not sent yet.
        deadline: by the event loop's clock.
    """

    def __init__(
        self,
        first: Event,
        handle: RequestHandle,
        to_sse_event: Callable[[Preview | ImageFinished], list[bytes]],
        outgoing: Outgoing,
        deadline: float,
    ) -> None:
        frames = _frames(first, handle, to_sse_event, outgoing, deadline)
        super().__init__(frames, media_type="text/event-stream", headers=_HEADERS)
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._handle:
            await super().__call__(scope, receive, send)


def sse_event(name: str, body: dict[str, Any]) -> bytes:
    """One event with a small body."""
    return b"event: " + name.encode() + b"\ndata: " + to_json(body) + b"\n\n"


async def _frames(
    event: Event | None,
    handle: RequestHandle,
    to_sse_event: Callable[[Preview | ImageFinished], list[bytes]],
    outgoing: Outgoing,
    deadline: float,
) -> AsyncGenerator[bytes, None]:
    sent: set[tuple[int, int]] = set()  # previews come again when an engine crashed and another began anew
    try:
        while event is not None:
            if isinstance(event, Preview | ImageFinished):
                again = isinstance(event, Preview) and (event.index, event.number) in sent
                if not again:
                    async for piece in iter_chunks(await write(to_sse_event, event)):
                        yield piece
                outgoing.taken(len(event.data))
            if isinstance(event, Preview):
                sent.add((event.index, event.number))
            while True:
                try:
                    async with asyncio.timeout(_wait_s(deadline)):
                        event = await anext(handle, None)
                    break
                except TimeoutError:
                    yield _PING
    except RequestError as error:
        yield _error(error)
    except Exception:  # the edge of the HTTP half: the status is sent already
        yield _error(GenerationError("The server failed on this request; its log says why."))
        raise


def _wait_s(deadline: float) -> float:
    left = deadline - asyncio.get_running_loop().time()
    if left <= 0:
        raise DeadlineExceededError("The request was not finished within its time.")
    return min(_PING_S, left)


def _error(error: RequestError) -> bytes:
    return sse_event("error", {"type": "error", "error": error_body(error)["error"]})
