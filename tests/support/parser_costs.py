"""What reading costs: how it grows with the input, and the most memory that it takes."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress

from hypergen.errors import InvalidRequestError, PayloadTooLargeError, RequestError

_NOISE_S = 3e-3


def growth(read: Callable[[bytes], object], make: Callable[[int], bytes], size: int) -> float:
    """CPU time for an input of twice the size over that for the size, each the best of five: 2 is linear,
    4 quadratic. A refusal is an answer too.
    """
    costs = [min(_cpu_s(read, make(length)) for _ in range(5)) for length in (size, 2 * size)]
    return (costs[1] + _NOISE_S) / (costs[0] + _NOISE_S)


def memory(read: Callable[[bytes], object], data: bytes) -> float:
    """The most memory that was allocated meanwhile, in sizes of the input, which is not counted."""
    tracemalloc.start()
    try:
        with suppress(RequestError):
            read(data)
        return tracemalloc.get_traced_memory()[1] / len(data)
    finally:
        tracemalloc.stop()


def _cpu_s(read: Callable[[bytes], object], data: bytes) -> float:
    began_s = time.thread_time()
    with suppress(RequestError):
        read(data)
    return time.thread_time() - began_s


def refusal(read: Callable[[], object]) -> RequestError | None:
    """How the client is told that its input will not do; None: it will. Any other exception is a fault."""
    try:
        read()
    except (InvalidRequestError, PayloadTooLargeError) as error:
        return error
    return None
