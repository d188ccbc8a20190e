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
from hypergen.api.responses import in_slices, write
from hypergen.errors import DeadlineExceededError, GenerationError, RequestError
from hypergen.events import Event, ImageFinished, Preview

# Proxies close connections that are silent for a minute.
_PING_S = 15.0
_PING = b": still drawing\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Arrivals:
    """The events of one request, taken from its generator as they come, however slowly the client reads: a
    client holds memory, which is counted, and never the engine.
    """

    def __init__(self, events: AsyncGenerator[Event, None], outgoing: Outgoing) -> None:
        self._events = events
        self._outgoing = outgoing
        self._queue: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._take())

    async def next(self) -> Event | None:
        """The next event; None after the last.

        Raises:
            RequestError: the request failed.
        """
        event = await self._queue.get()
        if isinstance(event, Exception):
            raise event
        return event

    def sent(self, event: Preview | ImageFinished) -> None:
        self._outgoing.taken(len(event.data))

    async def close(self) -> None:
        """Cancel what is not finished."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _take(self) -> None:
        try:
            async for event in self._events:
                if isinstance(event, Preview | ImageFinished):
                    self._outgoing.hold(len(event.data))
                self._queue.put_nowait(event)
            self._queue.put_nowait(None)
        except Exception as error:  # raised where the events are read
            self._queue.put_nowait(error)
        finally:
            await self._events.aclose()


class EventStream(StreamingResponse):
    """The answer to a request that has begun. When the client leaves, the request is cancelled.

    Args:
        to_frame: an event as it is sent, in pieces; runs in a thread.
        deadline: by the event loop's clock.
    """

    def __init__(
        self,
        first: Event | None,
        arrivals: Arrivals,
        to_frame: Callable[[Preview | ImageFinished], list[bytes]],
        deadline: float,
    ) -> None:
        frames = _frames(first, arrivals, to_frame, deadline)
        super().__init__(frames, media_type="text/event-stream", headers=_HEADERS)
        self._arrivals = arrivals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._arrivals.close()


def frame(name: str, body: dict[str, Any]) -> bytes:
    """One event with a small body."""
    return b"event: " + name.encode() + b"\ndata: " + to_json(body) + b"\n\n"


async def _frames(
    event: Event | None,
    arrivals: Arrivals,
    to_frame: Callable[[Preview | ImageFinished], list[bytes]],
    deadline: float,
) -> AsyncGenerator[bytes, None]:
    sent: set[tuple[int, int]] = set()  # previews come again when an engine crashed and another began anew
    try:
        while event is not None:
            if isinstance(event, Preview | ImageFinished):
                again = isinstance(event, Preview) and (event.index, event.number) in sent
                if not again:
                    async for piece in in_slices(await write(to_frame, event)):
                        yield piece
                arrivals.sent(event)
            if isinstance(event, Preview):
                sent.add((event.index, event.number))
            while True:
                try:
                    async with asyncio.timeout(_wait_s(deadline)):
                        event = await arrivals.next()
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
    return frame("error", {"type": "error", "error": error_body(error)["error"]})
