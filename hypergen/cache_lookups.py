"""How often the caches of this process found an entry."""

from __future__ import annotations

import threading
from collections import Counter

_lock = threading.Lock()
_hits: Counter[str] = Counter()
_misses: Counter[str] = Counter()


def count_lookup(cache: str, *, found: bool) -> None:
    """Count one lookup; from any thread."""
    with _lock:
        (_hits if found else _misses)[cache] += 1


def cache_lookups() -> dict[str, tuple[int, int]]:
    """Cache -> hits and misses since the start of the process."""
    with _lock:
        return {cache: (_hits[cache], _misses[cache]) for cache in sorted(_hits | _misses)}
