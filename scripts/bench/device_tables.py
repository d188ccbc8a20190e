"""The tables of `python -m scripts.bench --device`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from hypergen.config import EngineSettings
from scripts.bench import report
from scripts.bench.device import DEFAULT, OURS, VARIANTS, Measured, Speed
from scripts.bench.timeline import PASS


def print_work(console: Console, measured: Measured) -> None:
    """The arithmetic of a picture, before anything is measured."""
    work, steps = measured.work, measured.plan.steps
    console.print(
        f"{measured.model}: {work.forward_flops / 1e12:.3g} TFLOP a row, {work.rows} rows a step, "
        f"{work.decode_flops / 1e12:.3g} TFLOP to decode; this device {work.peak_flops / 1e12:.3g} TFLOP/s: "
        f"a picture of {steps} steps cannot take less than {work.floor_s(steps):.3g} s",
        highlight=False,
    )


def print_all(console: Console, measured: Measured) -> None:
    _print_speeds(console, measured)
    _print_settings(console, measured)
    _print_passes(console, measured)
    _print_stages(console, measured)
    if measured.runs:
        console.print(
            f"The trace, served by {measured.served_by}; every request gives its seed, determinism is "
            f"{measured.determinism}; sequential: call after call to the same engine.",
            highlight=False,
        )
    report.print_runs(console, measured.runs)
    if measured.goals:
        report.print_gates(console, measured.goals, "Goals")
    elif measured.environment["accelerator"] is None:
        console.print("Goals are for published models on CUDA; none is judged here.", highlight=False)
    for part in measured.unmeasured:
        console.print(f"Goal without a figure: {part}", highlight=False)
    for what, why in measured.left_out.items():
        console.print(f"Not measured: {what}: {why}", highlight=False)


def _print_speeds(console: Console, measured: Measured) -> None:
    plan = measured.plan
    size = f"{measured.side}x{measured.side}"
    title = f"{measured.model}, {size}, {plan.steps} steps, alone and {plan.crowd} at once"
    table = Table(title=title, title_justify="left")
    for column in ("way", "alone s", "of floor", "pictures/s", "of floor", "rows a pass"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for speed in measured.speeds:
        table.add_row(
            speed.way,
            f"{speed.alone_s:.3f}",
            f"{speed.alone_of_floor:.0%}",
            f"{speed.crowd_per_s:.2f}",
            f"{speed.crowd_of_floor:.0%}",
            f"{speed.crowd_rows:.1f}",
        )
    console.print(table)


def _print_settings(console: Console, measured: Measured) -> None:
    """Each setting for faster devices, its default, and what another value gave here."""
    table = Table(title="Settings, against all of them as by default", title_justify="left")
    for column in ("setting", "default", "tried", "alone", "in a crowd"):
        table.add_column(column, justify="left" if column in ("setting", "default", "tried") else "right")
    speeds = {speed.way.removeprefix(OURS): speed for speed in measured.speeds}
    usual = speeds.get(DEFAULT)
    for variant, changes in VARIANTS.items():
        if len(changes) != 1:
            continue
        ((setting, tried),) = changes.items()
        default = EngineSettings.model_fields[setting].default
        table.add_row(setting, _shown(default), _shown(tried), *_gains(speeds.get(variant), usual))
    console.print(table)


def _gains(speed: Speed | None, usual: Speed | None) -> tuple[str, str]:
    if speed is None or usual is None:
        return "not measured", "not measured"
    return f"x{usual.alone_s / speed.alone_s:.2f}", f"x{speed.crowd_per_s / usual.crowd_per_s:.2f}"


def _shown(value: object) -> str:
    return {True: "on", False: "off", None: "torch chooses"}.get(value, str(value))  # pyright: ignore[reportArgumentType, reportCallIssue]  any value may be asked for


def _print_passes(console: Console, measured: Measured) -> None:
    table = Table(title=f"Passes, determinism {measured.determinism}", title_justify="left")
    for column in ("way", "size", "rows", "ms", "same bits", "served", "verdict of the size"):
        table.add_column(column, justify="right" if column in ("rows", "ms") else "left")
    for entry in measured.passes:
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
    table = Table(title=f"Timeline of pictures that overlap, {measured.served_by}", title_justify="left")
    for column in ("stage", "seconds", "of them beside passes", "holding up passes", "of the time"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for share in measured.stages:
        held = ("", "") if share.stage == PASS else (f"{share.holding_up_s:.3f}", f"{share.holding_up:.1%}")
        table.add_row(share.stage, f"{share.seconds:.3f}", f"{share.beside_s:.3f}", *held)
    console.print(table)
