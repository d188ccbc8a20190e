"""Responses with images: megabytes of base64, encoded in a thread and sent in chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Self, TypeVar, TypeVarTuple

from starlette.responses import StreamingResponse

from hypergen.api.outgoing_answers import OutgoingResponse

_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")

# One thread: base64 of an image holds the GIL for milliseconds. Several threads that pass the GIL to each
# other would block the event loop for the sum of their times.
_WRITER = ThreadPoolExecutor(1, "write")
CHUNK_BYTES = 256 * 1024
_REPEATED = "idempotent-replayed"


@dataclass(frozen=True)
class Answer:
    """The answer to one request, which several clients may get.

    Args:
        pieces: the body, as pieces of JSON.
        model: id of the model that answered.
        request_id: of the request whose answer it is.
    """

    status: int
    headers: dict[str, str]
    pieces: list[bytes]
    model: str | None
    request_id: str

    @property
    def nbytes(self) -> int:
        """Size of the body."""
        return sum(len(piece) for piece in self.pieces)

    def repeated(self) -> Self:
        """The answer to a repeated request."""
        return replace(self, headers={**self.headers, _REPEATED: "true"})

    @property
    def is_repeated(self) -> bool:
        return _REPEATED in self.headers

    def to_response(self, outgoing: OutgoingResponse) -> StreamingResponse:
        return chunked_json_response(self.pieces, outgoing, self.status, self.headers)


async def write(function: Callable[[*_Arguments], _Result], *arguments: *_Arguments) -> _Result:
    """Call a function in the writer thread."""
    return await asyncio.get_running_loop().run_in_executor(_WRITER, function, *arguments)


def chunked_json_response(
    pieces: list[bytes],
    outgoing: OutgoingResponse,
    status: int = 200,
    headers: dict[str, str] | None = None,
) -> StreamingResponse:
    """A JSON response that is sent in chunks."""
    size = sum(len(piece) for piece in pieces)
    outgoing.add_pending(size)
    response = StreamingResponse(iter_chunks(pieces), status, headers, media_type="application/json")
    response.headers["content-length"] = str(size)
    return response


async def iter_chunks(pieces: Iterable[bytes]) -> AsyncGenerator[bytes, None]:
    """The same bytes in small chunks, so that writing megabytes to a socket does not block the event loop."""
    for piece in pieces:
        for start in range(0, len(piece), CHUNK_BYTES):
            yield piece[start : start + CHUNK_BYTES]
            await asyncio.sleep(0)  # with a fast client, `send` never yields
