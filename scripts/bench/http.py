"""What HTTP costs: start-up, lone requests, the event loop, encoding; python -m scripts.bench --http."""

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

_FIRST_PICTURE_S = 10.0
_OVERHEAD_MS = 10.0
_BLOCKED_MS = 20.0
_ENCODING_MS = 80.0


def measure(console: Console, output: Path) -> tuple[dict[str, Any], list[Gate]]:
    """Measure everything, print it, and write it to http.json in `output`; returns figures and gates.

    The event loop is judged by how late a task on it wakes up. Where the machine had more to do than it has
    cores before this began, lateness on the wall says little, and what counts is what the server's own
    process can have caused; see `Delays`.
    """
    found = report.environment(report.command_line())
    crowded = os.getloadavg()[0] > (os.cpu_count() or 1)
    encodings = encoding.measure()
    _print(console, "Encoding a PNG of 1024x1024", encodings)
    with tempfile.TemporaryDirectory() as folder, console.status("start-up and lone requests"):
        start_up, overheads = overhead.measure(Path(folder))
    _print(console, "From the start to the first picture, embedded model, warm", [start_up])
    console.print(start_up.said, highlight=False)
    _print(console, "Lone requests, embedded model", overheads)
    with tempfile.TemporaryDirectory() as folder, console.status("event loop"):
        delays = loop.measure(Path(folder))
    _print(console, "Event loop, how late a task on it wakes up", delays)
    if crowded:
        console.print(
            "This machine had more to do than it has cores: the event loop is judged by its own process "
            "alone.",
            highlight=False,
        )
    checked = [*_gates(start_up, overheads, encodings), _blocked_gate(delays, crowded)]
    figures = {
        "start_up": asdict(start_up),
        "overhead": [asdict(entry) for entry in overheads],
        "event_loop": [asdict(entry) for entry in delays],
        "encoding": [asdict(entry) for entry in encodings],
    }
    content = {
        "environment": found,
        **figures,
        "gates": [{**asdict(gate), "reached": gate.reached} for gate in checked],
    }
    (output / "http.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return figures, checked


def _gates(start_up: StartUp, overheads: Sequence[Overhead], encodings: Sequence[Encoding]) -> Iterator[Gate]:
    yield Gate("first answer after start, s", start_up.first_picture_s, _FIRST_PICTURE_S, at_most=True)
    for entry in overheads:
        what = f"{entry.size}: p50 of a lone request beyond drawing and encoding, ms"
        yield Gate(what, entry.overhead_p50_ms, _OVERHEAD_MS, at_most=True)
    for entry in encodings:
        if entry.picture == "photo-like":
            what = "CPU time to encode a photo-like PNG of 1024x1024, ms"
            yield Gate(what, entry.cpu_ms, _ENCODING_MS, at_most=True)


def _blocked_gate(delays: Sequence[Delays], crowded: bool) -> Gate:
    answering = next(entry for entry in delays if entry.during == "answering")
    measured = answering.own_longest_ms if crowded else answering.longest_ms
    what = "event loop blocked at most, " + ("own process, ms" if crowded else "ms")
    return Gate(what, measured, _BLOCKED_MS, at_most=True)


def _print(console: Console, title: str, rows: Sequence[Any]) -> None:
    """A table with a column for each field; texts that are lines of their own are left out."""
    names = [name for name in asdict(rows[0]) if name != "said"]
    table = Table(title=title, title_justify="left")
    for name in names:
        text = isinstance(getattr(rows[0], name), str)
        table.add_column(_heading(name), justify="left" if text else "right")
    for row in rows:
        values = [getattr(row, name) for name in names]
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in values))
    console.print(table)


def _heading(name: str) -> str:
    """A field's name as a column: `own_longest_ms` is "own longest ms"."""
    return name.replace("p999", "p99.9").replace("_", " ")
