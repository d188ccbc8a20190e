"""Responses with images: megabytes of base64, encoded in a thread and sent in chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")

# One thread: base64 of an image holds the GIL for milliseconds. Several threads that pass the GIL to each
# other would block the event loop for the sum of their times.
_WRITER = ThreadPoolExecutor(1, "write")
CHUNK_BYTES = 256 * 1024


async def write(function: Callable[[*_Arguments], _Result], *arguments: *_Arguments) -> _Result:
    """Call a function in the writer thread."""
    return await asyncio.get_running_loop().run_in_executor(_WRITER, function, *arguments)


async def iter_chunks(pieces: Iterable[bytes]) -> AsyncGenerator[bytes, None]:
    """The same bytes in small chunks, so that writing megabytes to a socket does not block the event loop."""
    for piece in pieces:
        for start in range(0, len(piece), CHUNK_BYTES):
            yield piece[start : start + CHUNK_BYTES]
            await asyncio.sleep(0)  # with a fast client, `send` never yields
