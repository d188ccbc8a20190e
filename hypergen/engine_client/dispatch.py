"""The choice of the engine that gets a request: the one that would finish it first, by estimated seconds.

So the engine with the least work gets it, and with several models one that has the model in memory, as long
as a load elsewhere would take longer than the wait.
"""

from __future__ import annotations

from collections.abc import Sequence

from hypergen.engine_client.engine_requests import EngineRequests, PoolHandle

_MOST_MOVED = 32  # at once; more only when the engine is idle again


def assign(handle: PoolHandle, engines: Sequence[EngineRequests]) -> bool:
    """Add a request to an engine, a ready one if there is any; returns False if all have failed."""
    able = [engine for engine in engines if engine.supervisor.status.state != "failed"]
    if able:
        min(able, key=lambda engine: (not engine.is_ready, engine.estimated_seconds(handle))).add(handle)
    return bool(able)


def take_held(engine: EngineRequests, engines: Sequence[EngineRequests]) -> None:
    """Move the held requests of engines that are not ready to this one, which is."""
    for other in engines:
        if not other.is_ready:
            engine.held.extend(other.held)
            other.held.clear()
    engine.submit_next()


def take_waiting(engine: EngineRequests, engines: Sequence[EngineRequests]) -> None:
    """Move waiting requests to an engine without requests, the oldest first, while they are done sooner."""
    if not engine.is_ready or engine.handles:
        return
    for _ in range(_MOST_MOVED):
        others = [(other.estimated_seconds(), other) for other in engines if other.oldest_waiting()]
        seconds, busiest = max(others, key=lambda entry: entry[0], default=(0.0, engine))
        handle = busiest.oldest_waiting()
        if busiest is engine or handle is None or engine.estimated_seconds(handle) >= seconds:
            return
        busiest.remove(handle, cancel=True)
        engine.add(handle)
