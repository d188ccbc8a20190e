"""Cancellation of work for a client that disconnects, or at the deadline of its request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from starlette.requests import Request

from hypergen.api.errors import ClientDisconnectedError
from hypergen.errors import DeadlineExceededError

_Result = TypeVar("_Result")


async def client_disconnected(request: Request) -> None:
    """Return when the client has disconnected; the body must have been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def run_until_disconnect(
    work: asyncio.Future[_Result], disconnected: Awaitable[object], deadline: float
) -> _Result:
    """The result of `work`, which is cancelled if the client disconnects or the deadline passes.

    Args:
        disconnected: returns when the client has disconnected.
        deadline: time of the event loop's clock.

    Raises:
        ClientDisconnectedError: the client disconnected.
        DeadlineExceededError: the deadline has passed.
    """
    disconnecting = asyncio.ensure_future(disconnected)
    try:
        timeout_s = max(0.0, deadline - asyncio.get_running_loop().time())
        await asyncio.wait([work, disconnecting], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        if disconnecting.done():
            raise ClientDisconnectedError
        raise DeadlineExceededError("The request did not finish before its deadline.")
    finally:
        await cancel(work)
        await cancel(disconnecting)


async def cancel(task: asyncio.Future[Any]) -> None:
    """Cancel a task, if it has not ended, and wait until it has released its resources."""
    if not task.done():
        task.cancel()
        # Not `await task`: its CancelledError would look like a cancellation of the current task.
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()
