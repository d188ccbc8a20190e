"""The results of `python -m scripts.bench --device` as Markdown, for docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from scripts.bench.device import DEFAULT, LABELS, Measured
from scripts.bench.figures import Run, median_of, median_ratio
from scripts.bench.report import environment_lines, median_images
from scripts.bench.rows import Shape


def markdown(measured: Measured) -> str:
    """All measurements so far, with machine, command, date and versions."""
    plan, work, environment = measured.plan, measured.work, measured.environment
    blocks = [
        f"### {measured.model}",
        f"    {environment['command']}        # {environment['date']}",
        "\n".join(environment_lines(environment)),
        f"Weights {measured.dtype}, VAE in the engine {measured.vae_dtype}, {plan.steps} steps, guidance. "
        f"Operations: {work.forward_flops / 1e12:.3g} TFLOP per row, {work.rows} rows per image, "
        f"{work.decode_flops / 1e12:.3g} TFLOP to decode; at {work.peak_flops / 1e12:.3g} TFLOP/s an image "
        f"takes at least {work.floor_s(plan.steps):.3g} s (the floor).",
        *_speeds(measured),
        *(block for shape in measured.shapes for block in _rows(shape)),
        *_trace(measured),
        *_goals(measured),
    ]
    if measured.device_busy is not None:
        blocks.append(f"Under the profiler the GPU was busy for {measured.device_busy:.0%} of the time.")
    if measured.left_out:
        blocks.append("\n".join(f"- Not measured: {what}: {why}" for what, why in measured.left_out.items()))
    return "\n\n".join(blocks)


def _speeds(measured: Measured) -> Iterator[str]:
    if not measured.speeds:
        return
    size, at_once = f"{measured.side}x{measured.side}", measured.plan.batch_size
    header = (size, "single image, s", "of floor", f"images/s, {at_once} at once", "of floor")
    yield _table(
        (*header, "rows per batch", "peak memory, GB"),
        (
            (
                LABELS[speed.way],
                f"{speed.alone_s:.3f}",
                f"{speed.alone_of_floor:.0%}",
                f"{speed.batch_images_per_s:.2f}",
                f"{speed.batch_of_floor:.0%}",
                f"{speed.batch_rows:.1f}",
                _shown(speed.peak_gb, ".1f"),
            )
            for speed in measured.speeds
        ),
    )


def _rows(shape: Shape) -> Iterator[str]:
    yield (
        f"Forward passes at {shape.size}. Rows of the engine's batches: {shape.bucket}; "
        f"its probe says {shape.verdict}."
    )
    yield _table(
        (
            "rows",
            "ms",
            "ms without graph",
            "images/s",
            "bits as alone",
            f"bits as in a batch of {shape.bucket}",
        ),
        (
            (
                str(entry.rows),
                f"{1000 * entry.forward_s:.2f}",
                _shown(entry.eager_s and 1000 * entry.eager_s, ".2f"),
                _shown(entry.images_per_s, ".2f"),
                "yes" if entry.equal_alone else "no",
                "yes" if entry.equal_in_bucket else "no",
            )
            for entry in shape.row_counts
        ),
    )


def _trace(measured: Measured) -> Iterator[str]:
    """Medians over the job lists, and ratios to `sequential`."""
    if not measured.runs:
        return
    runs, (equal, total) = measured.runs, measured.same_bytes
    seeds = len({run.seed for run in runs})
    yield (
        f"Mixed trace, {runs[0].model}, {LABELS[DEFAULT]}, median of {seeds} job lists; sequential: one "
        f"request at a time to the same engine. {equal} of {total} images have the same bytes as alone."
    )
    columns = ("load", "policy", "jobs/s", "p50 s", "p95 s", "short p95 s", "batch size")
    loads = dict.fromkeys(run.load for run in runs)
    yield _table(
        columns,
        (
            _figures([run for run in runs if run.load == load], load, policy)
            for load in loads
            for policy in ("sequential", "step")
        ),
    )


def _figures(runs: Sequence[Run], load: float, policy: str) -> tuple[str, ...]:
    ratios = asdict(median_ratio(runs, policy, "sequential"))
    values = asdict(median_of(runs, policy))
    cells = (f"{value:.2f} (x{ratios[name]:.2f})" for name, value in values.items())
    return f"{load:g}", policy, *cells, f"{median_images(runs, policy):.2f}"


def _goals(measured: Measured) -> Iterator[str]:
    if not (measured.goals or measured.unmeasured):
        return
    rows = [
        (gate.what, f"{gate.measured:.3f}", gate.shown_limit, "" if gate.reached else "missed")
        for gate in measured.goals
    ]
    rows += [(what, "", "", "not measured") for what in measured.unmeasured]
    yield _table(("goal", "measured", "limit", ""), rows)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    first, *others = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return "\n".join([first, "|" + "---|" * len(columns), *others])
