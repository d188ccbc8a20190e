"""When an engine encodes texts, begins images, makes passes, decodes and writes files, as pictures arrive."""

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
from scripts.bench.live import Live
from scripts.bench.report import new_figure
from scripts.bench.work import GUIDANCE_SCALE

PASS, TEXT, BEGINNING, DECODING, FILE = "pass", "text encoding", "beginning", "decoding", "file"
ON_DEVICE = "decoding on the device"
_STAGES = (TEXT, BEGINNING, PASS, DECODING, ON_DEVICE, FILE)
_PICTURES, _MOST_STEPS = 6, 10


@dataclass(frozen=True)
class Span:
    """One piece of work; both times are seconds of the monotonic clock.

    Attributes:
        waited_for: it ran on the engine's thread, so the next pass could not begin before it had ended.
    """

    stage: str
    started_at: float
    ended_at: float
    waited_for: bool


@dataclass(frozen=True)
class Share:
    """What one stage took, summed over the pictures.

    Attributes:
        beside_s: of these seconds, those in which a pass was under way or nobody had to wait.
        holding_up_s: those in which the engine could have made a pass instead.
        holding_up: the same as a share of the time from the first pass to the last.
    """

    stage: str
    seconds: float
    beside_s: float
    holding_up_s: float
    holding_up: float


def watch(live: Live, steps: int, trace_file: Path) -> list[Span]:
    """Let pictures arrive while others are drawn, and note when each stage worked.

    Everything is drawn a second time under torch's profiler, which is slower, for a trace that
    chrome://tracing and Perfetto show: thread by thread and stream by stream.
    """
    steps = min(steps, _MOST_STEPS)
    jobs = [Job(number, number, steps, GUIDANCE_SCALE) for number in range(_PICTURES)]
    # Three at a time, however busy the machine is right now.
    interval_s = min(live.serve([job], 0)[0].latency_s for job in jobs[:3]) / 3
    with _noting(live) as spans:
        live.serve(jobs, interval_s)
    spans += [Span(FILE, *times, waited_for=False) for times in live.file_spans]
    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)  # pyright: ignore[reportAttributeAccessIssue]  torch has no public name for it
    with _noting(live), torch.profiler.profile(experimental_config=every_thread) as profile:
        live.serve(jobs, interval_s)
    profile.export_chrome_trace(str(trace_file))
    return spans


@contextmanager
def _noting(live: Live) -> Iterator[list[Span]]:
    """Spans of what the engine asks of its family, complete when the block is left."""
    family: Any = live.engine.family
    spans: list[Span] = []
    encode_prompts, prepare = family.encode_prompts, family.prepare
    forward, decode = family.forward, family.decode
    on_cuda = next(family.denoiser.parameters()).is_cuda
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    zero, zero_at = _moment() if on_cuda else (None, 0.0)

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        started = time.monotonic()
        with torch.profiler.record_function(name):
            yield
        thread = threading.current_thread().name
        spans.append(Span(name, started, time.monotonic(), waited_for=thread == "engine"))

    def noted_encoding(*given: Any) -> Any:
        with stage(TEXT):
            encoded = encode_prompts(*given)
            if on_cuda:
                torch.cuda.current_stream().synchronize()
            return encoded

    def noted_preparation(*given: Any) -> Any:
        with stage(BEGINNING):
            return prepare(*given)

    def noted_forward(*rows: Any, **named: Any) -> Tensor:
        with stage(PASS):
            prediction = forward(*rows, **named)
            synchronize(prediction)
            return prediction

    def noted_decode(*given: Any) -> Tensor:
        with stage(DECODING):
            if not on_cuda:
                return decode(*given)
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            image = decode(*given)
            ended.record()
            events.append((began, ended))
            return image

    family.encode_prompts, family.prepare = noted_encoding, noted_preparation
    family.forward, family.decode = noted_forward, noted_decode
    try:
        yield spans
    finally:
        del family.encode_prompts, family.prepare, family.decode
        family.forward = forward  # the engine's own, compiled or not
    if zero is not None:
        torch.cuda.synchronize()
        for began, ended in events:
            times = (zero_at + zero.elapsed_time(event) / 1000 for event in (began, ended))
            spans.append(Span(ON_DEVICE, *times, waited_for=False))


def _moment() -> tuple[torch.cuda.Event, float]:
    """A moment on the device's clock, and the same one on ours."""
    event = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    event.record()
    torch.cuda.synchronize()
    return event, time.monotonic()


def shares(spans: Sequence[Span]) -> list[Share]:
    """What each stage took, and how much of it fell between passes, from the first pass to the last."""
    passes = [span for span in spans if span.stage == PASS]  # one after another, on one thread
    first, last = min(span.started_at for span in passes), max(span.ended_at for span in passes)
    found: list[Share] = []
    for stage in _STAGES:
        if not (chosen := [span for span in spans if span.stage == stage]):
            continue
        seconds = sum(span.ended_at - span.started_at for span in chosen)
        held_s = 0.0
        for span in chosen:
            if span.waited_for and stage != PASS:
                inside = max(0.0, min(span.ended_at, last) - max(span.started_at, first))
                held_s += inside - sum(_overlap_s(span, other) for other in passes)
        found.append(Share(stage, seconds, seconds - held_s, held_s, held_s / (last - first)))
    return found


def _overlap_s(one: Span, other: Span) -> float:
    return max(0.0, min(one.ended_at, other.ended_at) - max(one.started_at, other.started_at))


def plot(spans: Sequence[Span], title: str, file: Path) -> None:
    """A line for each stage, a bar for each piece of work.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    figure = new_figure(11, 2.6)
    axes = figure.subplots()
    begin = min(span.started_at for span in spans)
    stages = [stage for stage in reversed(_STAGES) if any(span.stage == stage for span in spans)]
    for height, stage in enumerate(stages):
        bars = [(s.started_at - begin, s.ended_at - s.started_at) for s in spans if s.stage == stage]
        axes.broken_barh(bars, (height - 0.35, 0.7), facecolors=f"C{height}")
    axes.set_yticks(range(len(stages)), stages)
    axes.set(title=title, xlabel="seconds")
    figure.savefig(file, dpi=110)
