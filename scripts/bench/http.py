"""python -m scripts.bench --http: start-up, single requests, event loop delays, PNG encoding."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.bench import encoding, loop, overhead, report
from scripts.bench.encoding import Encoding
from scripts.bench.gates import Gate
from scripts.bench.loop import Delays
from scripts.bench.overhead import Overhead, StartUp

_FIRST_IMAGE_S = 10.0
_OVERHEAD_MS = 10.0
_BLOCKED_MS = 20.0
_ENCODING_MS = 80.0


def measure(console: Console, output: Path) -> tuple[dict[str, Any], list[Gate]]:
    """Measure all parts, print the results and write them to http.json in `output`.

    The delay of the event loop is how late a task on it wakes up. If the load average was higher than the
    number of cores before the start, only the delay by the server's own process counts; see `Delays`.

    Returns:
        The results and the gates.
    """
    environment = report.environment(report.command_line())
    overloaded = os.getloadavg()[0] > (os.cpu_count() or 1)
    encodings = encoding.measure()
    _print(console, "Encoding a PNG of 1024x1024", encodings)
    with tempfile.TemporaryDirectory() as folder, console.status("start-up and single requests"):
        start_up, overheads = overhead.measure(Path(folder))
    _print(console, "From the start to the first image, embedded model, warm", [start_up])
    console.print(start_up.ready_line, highlight=False)
    _print(console, "Single requests, embedded model", overheads)
    with tempfile.TemporaryDirectory() as folder, console.status("event loop"):
        delays = loop.measure(Path(folder))
    _print(console, "Event loop, delay of a task on it", delays)
    if overloaded:
        console.print(
            "The load average was higher than the number of cores: for the event loop, only the delay by the "
            "server's own process counts.",
            highlight=False,
        )
    gates = [*_gates(start_up, overheads, encodings), _blocked_gate(delays, overloaded)]
    figures = {
        "start_up": asdict(start_up),
        "overhead": [asdict(entry) for entry in overheads],
        "event_loop": [asdict(entry) for entry in delays],
        "encoding": [asdict(entry) for entry in encodings],
    }
    content = {
        "environment": environment,
        **figures,
        "gates": [{**asdict(gate), "reached": gate.reached} for gate in gates],
    }
    (output / "http.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return figures, gates


def _gates(start_up: StartUp, overheads: Sequence[Overhead], encodings: Sequence[Encoding]) -> Iterator[Gate]:
    yield Gate("first image after start, s", start_up.first_image_s, _FIRST_IMAGE_S, at_most=True)
    for entry in overheads:
        what = f"{entry.size}: p50 overhead of a single request over generation and encoding, ms"
        yield Gate(what, entry.overhead_p50_ms, _OVERHEAD_MS, at_most=True)
    for entry in encodings:
        if entry.image == "photo-like":
            what = "CPU time to encode a photo-like PNG of 1024x1024, ms"
            yield Gate(what, entry.cpu_ms, _ENCODING_MS, at_most=True)


def _blocked_gate(delays: Sequence[Delays], overloaded: bool) -> Gate:
    answering = next(entry for entry in delays if entry.during == "answering")
    measured = answering.own_longest_ms if overloaded else answering.longest_ms
    what = "longest delay of the event loop, " + ("own process, ms" if overloaded else "ms")
    return Gate(what, measured, _BLOCKED_MS, at_most=True)


def _print(console: Console, title: str, rows: Sequence[Any]) -> None:
    """Print a table with a column for each field except `ready_line`."""
    names = [name for name in asdict(rows[0]) if name != "ready_line"]
    table = Table(title=title, title_justify="left")
    for name in names:
        text = isinstance(getattr(rows[0], name), str)
        table.add_column(_heading(name), justify="left" if text else "right")
    for row in rows:
        values = [getattr(row, name) for name in names]
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in values))
    console.print(table)


def _heading(name: str) -> str:
    """The column title of a field, for example "own longest ms" for `own_longest_ms`."""
    return name.replace("p999", "p99.9").replace("_", " ")
