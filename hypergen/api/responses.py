"""Writing: answers with pictures, megabytes of base64, made beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

_Arguments = TypeVarTuple("_Arguments")
_Written = TypeVar("_Written")

# One thread: base64 of a picture holds the interpreter's lock for milliseconds, and several threads that hand
# the lock to each other would keep the event loop from it for as long as all of them take.
_WRITER = ThreadPoolExecutor(1, "write")
SLICE_BYTES = 256 * 1024


async def write(function: Callable[[*_Arguments], _Written], *arguments: *_Arguments) -> _Written:
    """What a function makes of its arguments, in the thread for this."""
    return await asyncio.get_running_loop().run_in_executor(_WRITER, function, *arguments)


async def iter_chunks(pieces: Iterable[bytes]) -> AsyncGenerator[bytes, None]:
    """The same bytes, slice by slice, so that handing megabytes to a socket does not hold up the loop."""
    for piece in pieces:
        for start in range(0, len(piece), SLICE_BYTES):
            yield piece[start : start + SLICE_BYTES]
            await asyncio.sleep(0)  # a fast client takes all of them without a pause
