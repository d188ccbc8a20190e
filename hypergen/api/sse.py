"""Streaming: images and previews as server-sent events.

The response starts with the request's first event, or at once if the client wants to know its progress.
Errors before that have their own status; later errors are events.

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
from hypergen.api.progress_report import ProgressReport, ProgressReporter
from hypergen.api.request_record import RequestRecord
from hypergen.api.responses import iter_chunks, write
from hypergen.engine_protocol import RequestHandle
from hypergen.errors import DeadlineExceededError, GenerationError, RequestError
from hypergen.events import Event, ImageFinished, Preview, Progress, RequestState, Started

# Proxies close connections that are silent for a minute.
_PING_S = 15.0
_PING = b": still generating\n\n"
# Between two reports of a waiting request's place in the queue.
_REPORT_S = 1.0
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """The streaming response to a submitted request, which is cancelled if the client disconnects.

    Args:
        to_sse_event: encodes an event, in pieces; runs in a thread.
        outgoing: counts the memory of events that are not sent yet.
        deadline: time of the event loop's clock.
        record: gets the error of a request that fails after the start of its response.
        reporter: None: no events about the progress.
        to_client_error: puts the client's names of fields into an error.
    """

    def __init__(
        self,
        first: Event | None,
        handle: RequestHandle,
        to_sse_event: Callable[[Preview | ImageFinished | ProgressReport], list[bytes]],
        outgoing: OutgoingResponse,
        deadline: float,
        record: RequestRecord,
        reporter: ProgressReporter | None,
        to_client_error: Callable[[RequestError], RequestError],
    ) -> None:
        frames = _frames(first, handle, to_sse_event, outgoing, deadline, record, reporter, to_client_error)
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
    first: Event | None,
    handle: RequestHandle,
    to_sse_event: Callable[[Preview | ImageFinished | ProgressReport], list[bytes]],
    outgoing: OutgoingResponse,
    deadline: float,
    record: RequestRecord,
    reporter: ProgressReporter | None,
    to_client_error: Callable[[RequestError], RequestError],
) -> AsyncGenerator[bytes, None]:
    sent: set[tuple[int, int]] = set()  # after an engine crash, the retry repeats previews
    try:
        async for event in _events(first, handle, deadline, _PING_S if reporter is None else _REPORT_S):
            if isinstance(event, Preview | ImageFinished):
                repeated = isinstance(event, Preview) and (event.index, event.number) in sent
                if not repeated:
                    async for piece in iter_chunks(await write(to_sse_event, event)):
                        yield piece
                outgoing.remove_pending(len(event.data))
                if isinstance(event, Preview):
                    sent.add((event.index, event.number))
            elif reporter is not None:
                if isinstance(event, Started):
                    reporter.start()
                elif isinstance(event, Progress):
                    reporter.advance(event)
                yield b"".join(to_sse_event(reporter.report()))
            elif event is None:
                yield _PING
    except RequestError as error:
        record.fail(error)
        yield _error(to_client_error(error))
    except Exception as error:  # The status is already sent, so the client gets an error event.
        record.fail(error)
        yield _error(GenerationError("The server failed on this request; see its log."))
        raise


async def _events(
    first: Event | None, handle: RequestHandle, deadline: float, silence_s: float
) -> AsyncGenerator[Event | None, None]:
    """The events of a request, from the first; None at the start without one, and after each silence."""
    yield first
    while True:
        try:
            async with asyncio.timeout(_wait_s(deadline, silence_s)):
                event = await anext(handle, None)
        except TimeoutError:
            yield None
            continue
        if event is None:
            return
        yield event


def _wait_s(deadline: float, longest_s: float) -> float:
    left = deadline - asyncio.get_running_loop().time()
    if left <= 0:
        raise DeadlineExceededError("The request did not finish before its deadline.")
    return min(longest_s, left)


def _error(error: RequestError) -> bytes:
    return sse_event("error", {"type": "error", "error": error_body(error)["error"]})
