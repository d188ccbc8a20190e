"""Streaming: images and previews as server-sent events.

The response starts with the request's first event. Errors before that have their own status; later errors are
events.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html and OpenAI's image streaming events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from hypergen.api.errors import error_body, to_json
from hypergen.api.outgoing_answers import OutgoingResponse
from hypergen.api.request_record import RequestRecord
from hypergen.api.responses import iter_chunks, write
from hypergen.engine_protocol import RequestHandle
from hypergen.errors import DeadlineExceededError, GenerationError, RequestError
from hypergen.events import Event, ImageFinished, Preview, RequestState

# Proxies close connections that are silent for a minute.
_PING_S = 15.0
_PING = b": still generating\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """The streaming response to a submitted request, which is cancelled if the client disconnects.

    Args:
        to_sse_event: encodes an event, in pieces; runs in a thread.
        outgoing: counts the memory of events that are not sent yet.
        deadline: time of the event loop's clock.
        record: gets the error of a request that fails after the start of its response.
    """

    def __init__(
        self,
        first: Event,
        handle: RequestHandle,
        to_sse_event: Callable[[Preview | ImageFinished], list[bytes]],
        outgoing: OutgoingResponse,
        deadline: float,
        record: RequestRecord,
    ) -> None:
        frames = _frames(first, handle, to_sse_event, outgoing, deadline, record)
        super().__init__(frames, media_type="text/event-stream", headers=_HEADERS)
        self._handle = handle
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._handle:
            try:
                await super().__call__(scope, receive, send)
            finally:
                if self._handle.state is not RequestState.FINISHED:
                    self._record.disconnect()


def sse_event(name: str, body: dict[str, Any]) -> bytes:
    """One event with a small body."""
    return b"event: " + name.encode() + b"\ndata: " + to_json(body) + b"\n\n"


async def _frames(
    event: Event | None,
    handle: RequestHandle,
    to_sse_event: Callable[[Preview | ImageFinished], list[bytes]],
    outgoing: OutgoingResponse,
    deadline: float,
    record: RequestRecord,
) -> AsyncGenerator[bytes, None]:
    sent: set[tuple[int, int]] = set()  # after an engine crash, the retry repeats previews
    try:
        while event is not None:
            if isinstance(event, Preview | ImageFinished):
                repeated = isinstance(event, Preview) and (event.index, event.number) in sent
                if not repeated:
                    async for piece in iter_chunks(await write(to_sse_event, event)):
                        yield piece
                outgoing.remove_pending(len(event.data))
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
        record.fail(error)
        yield _error(error)
    except Exception as error:  # The status is already sent, so the client gets an error event.
        record.fail(error)
        yield _error(GenerationError("The server failed on this request; see its log."))
        raise


def _wait_s(deadline: float) -> float:
    left = deadline - asyncio.get_running_loop().time()
    if left <= 0:
        raise DeadlineExceededError("The request did not finish before its deadline.")
    return min(_PING_S, left)


def _error(error: RequestError) -> bytes:
    return sse_event("error", {"type": "error", "error": error_body(error)["error"]})
