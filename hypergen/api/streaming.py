"""Streaming: pictures as server-sent events, with previews while they are drawn.

The answer starts when an engine has begun with the request: what is wrong before is a plain error with its
own status, what fails later is an event.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html and OpenAI's image streaming events.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

from starlette.responses import StreamingResponse

from hypergen.api.errors import envelope, status_of, to_json
from hypergen.api.writing import in_slices, write
from hypergen.errors import DeadlineExceededError, GenerationError, RequestError
from hypergen.generation import Event, ImageFinished, Preview

# Proxies close connections that are silent for a minute.
_PING_S = 15.0
_PING = b": still drawing\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def in_frames(
    first: Event,
    events: AsyncGenerator[Event, None],
    to_frame: Callable[[Preview | ImageFinished], list[bytes]],
    until: float,
) -> StreamingResponse:
    """The answer to a request that is being drawn. When the client leaves, `events` is closed.

    Args:
        to_frame: an event as it is sent, in pieces; runs in a thread.
        until: the time of the monotonic clock at which the request has taken too long.
    """
    frames = _frames(first, events, to_frame, until)
    return StreamingResponse(frames, media_type="text/event-stream", headers=_HEADERS)


def frame(name: str, body: dict[str, Any]) -> bytes:
    """One event with a small body."""
    return b"event: " + name.encode() + b"\ndata: " + to_json(body) + b"\n\n"


async def _frames(
    first: Event,
    events: AsyncGenerator[Event, None],
    to_frame: Callable[[Preview | ImageFinished], list[bytes]],
    until: float,
) -> AsyncGenerator[bytes, None]:
    sent: set[tuple[int, int]] = set()  # previews come again when an engine died and another began anew
    event: Event | None = first
    coming: asyncio.Future[Event | None] | None = None
    try:
        while event is not None:
            again = isinstance(event, Preview) and (event.index, event.number) in sent
            if isinstance(event, Preview | ImageFinished) and not again:
                async for piece in in_slices(await write(to_frame, event)):
                    yield piece
            if isinstance(event, Preview):
                sent.add((event.index, event.number))
            coming = asyncio.ensure_future(anext(events, None))
            while not (await asyncio.wait([coming], timeout=_wait_s(until)))[0]:
                yield _PING
            event = coming.result()
    except RequestError as error:
        yield _error(error)
    except Exception:  # the edge of the HTTP half: the status is sent already
        yield _error(GenerationError("The server failed on this request; its log says why."))
        raise
    finally:
        if coming is not None and not coming.done():
            coming.cancel()
            with suppress(asyncio.CancelledError, RequestError):
                await coming
        await events.aclose()


def _wait_s(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise DeadlineExceededError("The request was not finished within its time.")
    return min(_PING_S, left)


def _error(error: RequestError) -> bytes:
    told = envelope(status_of(error), error.message, error.param, error.code)["error"]
    return frame("error", {"type": "error", "error": told})
