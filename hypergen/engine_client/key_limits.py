"""Limits of API keys: unfinished requests, and images per minute."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque

from hypergen.errors import InvalidRequestError, QueueFullError
from hypergen.request import ApiKey

_MINUTE_S = 60.0


class ImageRates:
    """The images that each key was admitted for in the last minute."""

    def __init__(self) -> None:
        self._admitted: defaultdict[str, deque[tuple[float, int]]] = defaultdict(deque)

    def check(self, key: ApiKey, n: int) -> None:
        """Whether the key may have `n` more images now.

        Raises:
            InvalidRequestError: not even in a minute without other requests.
            QueueFullError: not yet; `retry_after_s` says when.
        """
        limit = key.images_per_minute
        if limit is None:
            return
        if n > limit:
            raise InvalidRequestError(
                f"'n' must be at most {limit}: this key has {limit} images per minute.", param="n"
            )
        seconds = self._seconds_until(self._admitted[key.name], limit - n)
        if seconds > 0:
            raise QueueFullError(
                f"This key has {limit} images per minute. Try again in {math.ceil(seconds)} s.",
                code="rate_limit_exceeded",
                retry_after_s=math.ceil(seconds),
            )

    def record(self, key: ApiKey, n: int) -> None:
        """Count the images of an admitted request."""
        if key.images_per_minute is not None:
            self._admitted[key.name].append((time.monotonic(), n))

    def _seconds_until(self, admitted: deque[tuple[float, int]], most: int) -> float:
        """Seconds until the last minute has at most this many images."""
        now = time.monotonic()
        while admitted and admitted[0][0] <= now - _MINUTE_S:
            admitted.popleft()
        images = sum(n for _, n in admitted)
        for at, n in admitted:
            if images <= most:
                return 0.0
            images -= n
            if images <= most:
                return at + _MINUTE_S - now
        return 0.0
