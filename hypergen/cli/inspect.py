"""`hypergen inspect`: what a file is, and whether and how it would be served, without loading it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from hypergen.errors import ModelError
from hypergen.model_store import single_file, store
from hypergen.model_store.checkpoint_detection import METADATA, Checkpoint, read_checkpoint
from hypergen.model_store.diffusers_layout import check_folder, pipeline_class_of, safetensors_header
from hypergen.model_store.model_check import Report, check_in_process
from hypergen.served_model_config import ModelOptions

# A row of the output.
Row = tuple[str, str]


def inspect(given: str, configuration: str | None) -> Iterator[Row]:
    """Rows about a checkpoint file or a model folder, each as soon as it is known.

    Args:
        configuration: folder or store tag with the configuration of a checkpoint; None: searched as for
            serving, without a download.

    Raises:
        ModelError: it cannot be served.
    """
    path = Path(os.path.expanduser(given))
    if path.is_dir():
        yield from _inspect_folder(path, given)
    elif path.is_file():
        yield from _inspect_checkpoint(path, given, configuration)
    else:
        raise ModelError(f"No such file or folder: {given}")


def _inspect_folder(path: Path, given: str) -> Iterator[Row]:
    check_folder(path)
    yield "pipeline", pipeline_class_of(path, given)
    yield from _report(check_in_process(path))


def _inspect_checkpoint(file: Path, given: str, configuration: str | None) -> Iterator[Row]:
    if file.suffix != single_file.SUFFIX:
        raise ModelError(f"{given} must be a folder or a {single_file.SUFFIX} file.")
    header = safetensors_header(file, str(file.parent), file.name)
    checkpoint = read_checkpoint(header, given)
    yield from _describe(checkpoint, json.loads(header))
    folder = store.local_folder(configuration) if configuration else None
    folder = folder or single_file.find_configuration(given, checkpoint, store.local_folder)
    if folder is None:
        source = checkpoint.usual_source(given, ModelOptions())
        yield "configuration", f"{source}, not on this machine: its tensors were not compared"
        return
    yield "configuration", str(folder)
    yield from _report(_check_with(given, folder))


def _describe(checkpoint: Checkpoint, header: Mapping[str, dict[str, str]]) -> Iterator[Row]:
    dtypes = sorted({entry["dtype"] for name, entry in header.items() if name != METADATA})
    options = checkpoint.options
    yield "family", f"{checkpoint.family} ({checkpoint.pipelines[0]})"
    yield "layout", "original" if checkpoint.is_original else "diffusers"
    yield "components", ", ".join(checkpoint.components)
    yield "weights", ", ".join(dtypes)
    yield "input channels", str(checkpoint.in_channels)
    if not checkpoint.layout.markers:
        yield "prediction type", "flow matching"
        return
    yield "prediction type", options.prediction_type or "not stated; that of its configuration"
    if options.zero_terminal_snr:
        yield "zero terminal SNR", "yes"
    if options.clip_skip:
        yield "clip_skip", str(options.clip_skip)


def _check_with(given: str, folder: Path) -> Report:
    """Check a checkpoint with a configuration as the store would combine them."""
    chosen, selection = single_file.select(
        given, str(folder), ModelOptions(), False, lambda _: folder, lambda _: None
    )
    with tempfile.TemporaryDirectory(prefix="hypergen-") as name:
        for stored, source in selection.files.items():
            target = Path(name, stored)
            target.parent.mkdir(exist_ok=True)
            target.symlink_to((chosen / source).absolute())
        return check_in_process(Path(name))


def _report(report: Report) -> Iterator[Row]:
    for tensor, reason in report.ignored.items():
        yield "ignored", f"{tensor}: {reason}"
    if report.fault:
        raise ModelError(report.fault)
    yield "can be served", "yes"
