"""Time and memory of a parser, relative to the size of its input."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress

from hypergen.errors import InvalidRequestError, PayloadTooLargeError, RequestError

_NOISE_S = 3e-3


def growth(read: Callable[[bytes], object], make: Callable[[int], bytes], size: int) -> float:
    """CPU time for twice the size divided by that for the size, each the best of five: 2 is linear, 4
    quadratic. Inputs may also be refused.
    """
    costs = [min(_cpu_s(read, make(length)) for _ in range(5)) for length in (size, 2 * size)]
    return (costs[1] + _NOISE_S) / (costs[0] + _NOISE_S)


def memory(read: Callable[[bytes], object], data: bytes) -> float:
    """The peak of allocated memory, divided by the size of the input, which is not counted."""
    tracemalloc.start()
    try:
        with suppress(RequestError):
            read(data)
        return tracemalloc.get_traced_memory()[1] / len(data)
    finally:
        tracemalloc.stop()


def _cpu_s(read: Callable[[bytes], object], data: bytes) -> float:
    started_s = time.thread_time()
    with suppress(RequestError):
        read(data)
    return time.thread_time() - started_s


def refusal(read: Callable[[], object]) -> RequestError | None:
    """The error for the client, or None if the input is accepted. Other exceptions are bugs."""
    try:
        read()
    except (InvalidRequestError, PayloadTooLargeError) as error:
        return error
    return None
