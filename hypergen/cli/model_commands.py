"""Commands about model files and the model store: hypergen models | import | inspect | check | remove."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from hypergen.cli.setting_options import setting_options
from hypergen.config import EngineSettings

_print = partial(click.echo, err=True)


@click.command("models")
def list_models() -> None:
    """List the models in the model store."""
    from hypergen.model_store import store

    rows = [("TAG", "SIZE", "IMPORTED", "SOURCE")]
    for model in store.list_models():
        created = model.created.strftime("%Y-%m-%d %H:%M")
        rows.append((model.tag, f"{model.size_bytes / 1e6:.1f} MB", created, model.source))
    print_table(rows)


@click.command("import")
@click.argument("source", required=False)
@setting_options("revision", "dtype", "single_file_config")
def import_model(source: str | None, dtype: Any, **flags: Any) -> None:
    """Import SOURCE into the model store: a hub id, a folder or a file; by default the embedded model."""
    from hypergen.model_families import servable
    from hypergen.model_store import store
    from hypergen.model_store.model_check import refuse_unusable
    from hypergen.resolve_models import prefers_fp16

    stored = store.import_model(
        source,
        prefer_fp16=prefers_fp16(EngineSettings.model_validate({"dtype": dtype})),
        **flags,
        pipelines=servable(),
        check_files=refuse_unusable,
        report_progress=_print,
    )
    click.echo(stored.tag)


@click.command("inspect")
@click.argument("file")
@setting_options("single_file_config")
def inspect_file(file: str, single_file_config: str | None) -> None:
    """Print what FILE is: a checkpoint, a LoRA or a model folder. Nothing is loaded or downloaded.

    The exit status is 1 if it cannot be served.
    """
    from hypergen.cli.inspect import inspect

    _print_rows(inspect(file, single_file_config))


@click.command("check")
@click.argument("config", type=click.Path(path_type=Path))
def check_config(config: Path) -> None:
    """Check CONFIG, a file for --config or a served-model file, and the HYPERGEN_... variables.

    Prints what would be served. Nothing is loaded, downloaded or imported. The exit status is 1 if there is a
    fault.
    """
    from hypergen.cli.check import check

    _print_rows(check(config, os.environ))


@click.command("remove")
@click.argument("tags", nargs=-1, required=True, metavar="TAG...")
def remove_models(tags: tuple[str, ...]) -> None:
    """Remove the models with these TAGs from the model store, as `hypergen models` lists them.

    Files that they link to stay, such as those in the hub's cache.
    """
    from hypergen.model_store import store

    for tag in tags:
        store.remove_entry(tag)
        click.echo(tag)


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_rows(rows: Iterable[tuple[str, str]]) -> None:
    for name, value in rows:
        click.echo(f"{name + ':':18} {value}")
