"""The tables of `python -m scripts.bench --device`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from hypergen.config import EngineSettings
from scripts.bench import report
from scripts.bench.device import DEFAULT, OURS, VARIANTS, Measured, Speed
from scripts.bench.timeline import FORWARD


def print_work(console: Console, measured: Measured) -> None:
    """Print the operations of an image, before the measurements."""
    work, steps = measured.work, measured.plan.steps
    console.print(
        f"{measured.model}: {work.forward_flops / 1e12:.3g} TFLOP per row, {work.rows} rows per image, "
        f"{work.decode_flops / 1e12:.3g} TFLOP to decode; this device {work.peak_flops / 1e12:.3g} TFLOP/s: "
        f"an image of {steps} steps takes at least {work.floor_s(steps):.3g} s",
        highlight=False,
    )


def print_all(console: Console, measured: Measured) -> None:
    _print_speeds(console, measured)
    _print_settings(console, measured)
    _print_forwards(console, measured)
    _print_stages(console, measured)
    if measured.runs:
        console.print(
            f"The trace, run by {measured.served_by}; every request gives its seed, determinism is "
            f"{measured.determinism}; sequential: one request at a time to the same engine.",
            highlight=False,
        )
    report.print_runs(console, measured.runs)
    if measured.goals:
        report.print_gates(console, measured.goals, "Goals")
    elif measured.environment["accelerator"] is None:
        console.print("Goals are only checked for published models on CUDA.", highlight=False)
    for part in measured.unmeasured:
        console.print(f"Goal without a measurement: {part}", highlight=False)
    for what, why in measured.left_out.items():
        console.print(f"Not measured: {what}: {why}", highlight=False)


def _print_speeds(console: Console, measured: Measured) -> None:
    plan = measured.plan
    size = f"{measured.side}x{measured.side}"
    title = f"{measured.model}, {size}, {plan.steps} steps, single and {plan.batch_size} at once"
    table = Table(title=title, title_justify="left")
    for column in ("way", "single s", "of floor", "images/s", "of floor", "rows/batch"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for speed in measured.speeds:
        table.add_row(
            speed.way,
            f"{speed.alone_s:.3f}",
            f"{speed.alone_of_floor:.0%}",
            f"{speed.batch_images_per_s:.2f}",
            f"{speed.batch_of_floor:.0%}",
            f"{speed.batch_rows:.1f}",
        )
    console.print(table)


def _print_settings(console: Console, measured: Measured) -> None:
    """Print the speedup of each optimization setting against its default."""
    table = Table(title="Settings, against the defaults", title_justify="left")
    for column in ("setting", "default", "tried", "single", "batch"):
        table.add_column(column, justify="left" if column in ("setting", "default", "tried") else "right")
    speeds = {speed.way.removeprefix(OURS): speed for speed in measured.speeds}
    baseline = speeds.get(DEFAULT)
    for variant, changes in VARIANTS.items():
        if len(changes) != 1:
            continue
        ((setting, tried),) = changes.items()
        default = EngineSettings.model_fields[setting].default
        table.add_row(setting, _shown(default), _shown(tried), *_speedups(speeds.get(variant), baseline))
    console.print(table)


def _speedups(speed: Speed | None, baseline: Speed | None) -> tuple[str, str]:
    if speed is None or baseline is None:
        return "not measured", "not measured"
    return (
        f"x{baseline.alone_s / speed.alone_s:.2f}",
        f"x{speed.batch_images_per_s / baseline.batch_images_per_s:.2f}",
    )


def _shown(value: object) -> str:
    return {True: "on", False: "off", None: "torch chooses"}.get(value, str(value))  # pyright: ignore[reportArgumentType, reportCallIssue]  any value may be a key here


def _print_forwards(console: Console, measured: Measured) -> None:
    table = Table(title=f"Forward passes, determinism {measured.determinism}", title_justify="left")
    for column in ("way", "size", "rows", "ms", "bit-exact", "used", "verdict of the size"):
        table.add_column(column, justify="right" if column in ("rows", "ms") else "left")
    for entry in measured.forwards:
        seconds = entry["seconds"]
        table.add_row(
            entry["way"],
            entry["size"],
            str(entry["rows"]),
            "" if seconds is None else f"{1000 * seconds:.1f}",
            "yes" if entry["exact"] else "no",
            "yes" if entry["serves"] else "no",
            entry["verdict"],
        )
    console.print(table)


def _print_stages(console: Console, measured: Measured) -> None:
    if not measured.stages:
        return
    table = Table(title=f"Timeline of concurrent images, {measured.served_by}", title_justify="left")
    for column in ("stage", "seconds", "overlapped", "holding up forwards", "of the time"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for share in measured.stages:
        holding_up = (
            ("", "") if share.stage == FORWARD else (f"{share.holding_up_s:.3f}", f"{share.holding_up:.1%}")
        )
        table.add_row(share.stage, f"{share.seconds:.3f}", f"{share.overlapped_s:.3f}", *holding_up)
    console.print(table)
