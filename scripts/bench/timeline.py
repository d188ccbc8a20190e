"""The timeline of an engine: when it encodes prompts, prepares, denoises, decodes and encodes files."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypergen.engine.batch_invariance.probe import synchronize
from scripts.bench.jobs import Job
from scripts.bench.live import LiveEngine
from scripts.bench.report import new_figure
from scripts.bench.work import GUIDANCE_SCALE

FORWARD, PROMPT_ENCODING, PREPARATION = "forward pass", "prompt encoding", "preparation"
DECODING, FILE_ENCODING = "decoding", "file encoding"
ON_DEVICE = "decoding on the device"
_STAGES = (PROMPT_ENCODING, PREPARATION, FORWARD, DECODING, ON_DEVICE, FILE_ENCODING)
_IMAGES, _MAX_STEPS = 6, 10


@dataclass(frozen=True)
class Span:
    """One run of a stage; both times are monotonic seconds.

    Attributes:
        blocking: it ran on the engine's thread, so the next forward pass had to wait for it.
    """

    stage: str
    started_at: float
    ended_at: float
    blocking: bool


@dataclass(frozen=True)
class Share:
    """The time of one stage, summed over the images.

    Attributes:
        overlapped_s: seconds that did not delay a forward pass.
        holding_up_s: seconds in which the engine could have run a forward pass instead.
        holding_up: `holding_up_s` as a share of the time from the first forward pass to the last.
    """

    stage: str
    seconds: float
    overlapped_s: float
    holding_up_s: float
    holding_up: float


def record(engine: LiveEngine, steps: int, trace_file: Path) -> list[Span]:
    """Submit requests while others run, and record the spans of each stage.

    The requests run a second time under torch's profiler, which is slower. It writes a trace for
    chrome://tracing and Perfetto with all threads and streams.
    """
    steps = min(steps, _MAX_STEPS)
    jobs = [Job(number, number, steps, GUIDANCE_SCALE) for number in range(_IMAGES)]
    # About three concurrent images, however busy the machine is now.
    interval_s = min(engine.run([job], 0)[0].latency_s for job in jobs[:3]) / 3
    with _recording(engine) as spans:
        engine.run(jobs, interval_s)
    spans += [Span(FILE_ENCODING, *times, blocking=False) for times in engine.encoding_spans]
    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)  # pyright: ignore[reportAttributeAccessIssue]  torch has no public name for it
    with _recording(engine), torch.profiler.profile(experimental_config=every_thread) as profile:
        engine.run(jobs, interval_s)
    profile.export_chrome_trace(str(trace_file))
    return spans


@contextmanager
def _recording(engine: LiveEngine) -> Iterator[list[Span]]:
    """The spans of the calls to the model family in the block; complete after it."""
    family: Any = engine.engine.family
    spans: list[Span] = []
    encode_prompts, prepare = family.encode_prompts, family.prepare
    forward, decode = family.forward, family.decode
    on_cuda = next(family.denoiser.parameters()).is_cuda
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    zero, zero_at = _timed_event() if on_cuda else (None, 0.0)

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        started = time.monotonic()
        with torch.profiler.record_function(name):
            yield
        thread = threading.current_thread().name
        spans.append(Span(name, started, time.monotonic(), blocking=thread == "engine"))

    def timed_encode_prompts(*args: Any) -> Any:
        with stage(PROMPT_ENCODING):
            encoded = encode_prompts(*args)
            if on_cuda:
                torch.cuda.current_stream().synchronize()
            return encoded

    def timed_prepare(*args: Any) -> Any:
        with stage(PREPARATION):
            return prepare(*args)

    def timed_forward(*args: Any, **kwargs: Any) -> Tensor:
        with stage(FORWARD):
            prediction = forward(*args, **kwargs)
            synchronize(prediction)
            return prediction

    def timed_decode(*args: Any) -> Tensor:
        with stage(DECODING):
            if not on_cuda:
                return decode(*args)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            image = decode(*args)
            end.record()
            events.append((start, end))
            return image

    family.encode_prompts, family.prepare = timed_encode_prompts, timed_prepare
    family.forward, family.decode = timed_forward, timed_decode
    try:
        yield spans
    finally:
        del family.encode_prompts, family.prepare, family.decode
        family.forward = forward  # the engine may have replaced it by a compiled one
    if zero is not None:
        torch.cuda.synchronize()
        for start, end in events:
            times = (zero_at + zero.elapsed_time(event) / 1000 for event in (start, end))
            spans.append(Span(ON_DEVICE, *times, blocking=False))


def _timed_event() -> tuple[torch.cuda.Event, float]:
    """An event on the device and its time on the CPU's monotonic clock."""
    event = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    event.record()
    torch.cuda.synchronize()
    return event, time.monotonic()


def shares(spans: Sequence[Span]) -> list[Share]:
    """The share of each stage, from the first forward pass to the last."""
    forwards = [span for span in spans if span.stage == FORWARD]  # they do not overlap
    first, last = min(span.started_at for span in forwards), max(span.ended_at for span in forwards)
    result: list[Share] = []
    for stage in _STAGES:
        if not (stage_spans := [span for span in spans if span.stage == stage]):
            continue
        seconds = sum(span.ended_at - span.started_at for span in stage_spans)
        holding_up_s = 0.0
        for span in stage_spans:
            if span.blocking and stage != FORWARD:
                inside = max(0.0, min(span.ended_at, last) - max(span.started_at, first))
                holding_up_s += inside - sum(_overlap_s(span, other) for other in forwards)
        result.append(
            Share(stage, seconds, seconds - holding_up_s, holding_up_s, holding_up_s / (last - first))
        )
    return result


def _overlap_s(one: Span, other: Span) -> float:
    return max(0.0, min(one.ended_at, other.ended_at) - max(one.started_at, other.started_at))


def plot(spans: Sequence[Span], title: str, file: Path) -> None:
    """Plot a line for each stage with a bar for each span.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    figure = new_figure(11, 2.6)
    axes = figure.subplots()
    start = min(span.started_at for span in spans)
    stages = [stage for stage in reversed(_STAGES) if any(span.stage == stage for span in spans)]
    for height, stage in enumerate(stages):
        bars = [(s.started_at - start, s.ended_at - s.started_at) for s in spans if s.stage == stage]
        axes.broken_barh(bars, (height - 0.35, 0.7), facecolors=f"C{height}")
    axes.set_yticks(range(len(stages)), stages)
    axes.set(title=title, xlabel="seconds")
    figure.savefig(file, dpi=110)
