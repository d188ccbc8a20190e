"""Estimates in seconds, by which the engine of a request is chosen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

_MEMORY = 0.98  # weight of earlier forward passes after each one: about the last 50 count


class MeasuredCosts:
    """Measured seconds of a device for one unit of `GenerationRequest.work`, for each engine and model.

    Seconds are those of forward passes, so a batch costs what it takes and not each of its images.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[tuple[int, str], float] = defaultdict(float)
        self._work: defaultdict[tuple[int, str], float] = defaultdict(float)

    def record_forward(self, engine: int, model: str, seconds: float) -> None:
        """Count one forward pass."""
        key = engine, model
        self._seconds[key] = _MEMORY * self._seconds[key] + seconds
        self._work[key] *= _MEMORY

    def record_work(self, engine: int, model: str, work: float) -> None:
        """Count work that forward passes have done."""
        self._work[engine, model] += work

    def seconds_for(self, engine: int, model: str, work: float) -> float:
        """Estimated seconds for this much work: by this engine's forward passes of the model, else by those
        of other engines, else by those of other models. Before the first one, a unit of work is a second.
        """
        for keys in ([(engine, model)], [key for key in self._work if key[1] == model], list(self._work)):
            seconds, measured = (sum(of.get(key, 0.0) for key in keys) for of in (self._seconds, self._work))
            if seconds and measured:
                return work * seconds / measured
        return work


def estimated_seconds(
    requests: Iterable[tuple[str, float]], in_memory: Collection[str], load_s: Mapping[str, float]
) -> float:
    """Estimated seconds until an engine has finished its requests, with the loading of models that they lack.

    Args:
        requests: model and seconds of each.
        in_memory: models in the engine's memory.
        load_s: model -> seconds of its latest load by the engine.
    """
    seconds: defaultdict[str, float] = defaultdict(float)
    for model, request_s in requests:
        seconds[model] += request_s
    return sum(seconds.values()) + sum(load_s.get(model, 0.0) for model in seconds if model not in in_memory)
