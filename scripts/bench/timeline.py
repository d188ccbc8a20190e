"""A timeline of overlapping images, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from scripts.bench.jobs import Job
from scripts.bench.live import LiveEngine
from scripts.bench.work import GUIDANCE_SCALE

STAGES = ("encode_prompts", "prepare", "decode")  # methods of a model family
_IMAGES, _MAX_STEPS = 6, 10


def record(engine: LiveEngine, steps: int, file: Path) -> float | None:
    """Submit requests while others run, under the profiler, which makes them slower.

    Args:
        file: a trace for Perfetto with all threads and streams, and the stages by name; up to 300 MB.

    Returns:
        Share of the time from the first kernel to the last in which the GPU was busy; None on a CPU.
    """
    steps = min(steps, _MAX_STEPS)
    jobs = [Job(number, number, steps, GUIDANCE_SCALE) for number in range(_IMAGES)]
    # About three concurrent images.
    interval_s = min(engine.run([job], 0)[0].latency_s for job in jobs[:3]) / 3
    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)  # pyright: ignore[reportAttributeAccessIssue]  torch has no public name for it
    with (
        _named_stages(engine.engine.family),
        torch.profiler.profile(experimental_config=every_thread) as profile,
    ):
        engine.run(jobs, interval_s)
    profile.export_chrome_trace(str(file))
    return busy_share(
        (event.time_range.start, event.time_range.end)
        for event in profile.events() or ()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )


@contextmanager
def _named_stages(family: Any) -> Iterator[None]:
    def named(stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(stage):
                return call(*args, **kwargs)

        return run

    for stage in STAGES:
        setattr(family, stage, named(stage, getattr(family, stage)))
    try:
        yield
    finally:
        for stage in STAGES:
            delattr(family, stage)


def busy_share(intervals: Iterable[tuple[float, float]]) -> float | None:
    """The share of the time from the first start to the last end that intervals cover; None without any."""
    busy, end = 0.0, float("-inf")
    ordered = sorted(intervals)
    for start, stop in ordered:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / (end - ordered[0][0]) if ordered else None
