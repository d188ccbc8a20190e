"""`hypergen inspect`: what a file is, and whether and how it would be served, without loading it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hypergen.errors import ModelError, SettingError
from hypergen.lora.summary import summarise
from hypergen.model_families import REFINER_PIPELINE, servable
from hypergen.model_store import single_file, store
from hypergen.model_store.checkpoint_detection import METADATA, Checkpoint, is_lora, read_checkpoint
from hypergen.model_store.diffusers_layout import (
    PIPELINE_FILE,
    check_folder,
    pipeline_class_of,
    require_pipeline,
    safetensors_header,
)
from hypergen.model_store.model_check import Report, check_in_process
from hypergen.served_model_config import ModelOptions

# A row of the output.
Row = tuple[str, str]
# Fields of a LoRA's header that say what it was trained on, by Kohya's scripts and by ModelSpec.
_LORA_METADATA = {
    "ss_base_model_version": "base model",
    "modelspec.architecture": "architecture",
    "ss_network_module": "network",
    "modelspec.title": "title",
}


def inspect(given: str, configuration: str | None) -> Iterator[Row]:
    """Rows about a checkpoint, a LoRA or a model folder, each as soon as it is known.

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
        yield from _inspect_file(path, given, configuration)
    else:
        raise ModelError(f"No such file or folder: {given}")


def _inspect_folder(path: Path, given: str) -> Iterator[Row]:
    check_folder(path)
    pipeline = pipeline_class_of(path, given)
    yield "pipeline", pipeline
    if pipeline != REFINER_PIPELINE:
        require_pipeline(given, servable(), path / PIPELINE_FILE)
    yield from _served(check_in_process(path), pipeline)


def _inspect_file(file: Path, given: str, configuration: str | None) -> Iterator[Row]:
    if file.suffix != single_file.SUFFIX:
        raise ModelError(single_file.other_suffix(given))
    header = safetensors_header(file, str(file.absolute().parent), file.name)
    tensors: dict[str, Any] = json.loads(header)
    metadata = tensors.pop(METADATA, None) or {}
    if is_lora(tensors):
        yield from _describe_lora(file, tensors, metadata)
        return
    checkpoint = read_checkpoint(header, given)
    yield from _describe_checkpoint(checkpoint, tensors)
    folder = _find_configuration(given, checkpoint, configuration)
    if folder is None:
        source = checkpoint.usual_source(given, ModelOptions())
        yield "configuration", f"{source}, which is not on this machine (see --single-file-config)"
        yield "can be served", "if its tensors fit that configuration; they were not compared"
        return
    yield "configuration", str(folder)
    yield from _served(_check_checkpoint(given, folder), checkpoint.pipelines[0])


def _describe_checkpoint(checkpoint: Checkpoint, tensors: Mapping[str, Any]) -> Iterator[Row]:
    options = checkpoint.options
    yield "family", f"{checkpoint.family} ({checkpoint.pipelines[0]})"
    yield "layout", "original" if checkpoint.is_original else "diffusers"
    yield "components", ", ".join(checkpoint.components)
    yield "weights", _dtypes(tensors)
    yield "input channels", str(checkpoint.in_channels)
    if not checkpoint.layout.markers:
        yield "prediction type", "flow matching"
        return
    yield "prediction type", options.prediction_type or "not stated; that of its configuration"
    if options.zero_terminal_snr:
        yield "zero terminal SNR", "yes"
    if options.clip_skip:
        yield "clip_skip", str(options.clip_skip)


def _describe_lora(file: Path, tensors: Mapping[str, Any], metadata: Mapping[str, Any]) -> Iterator[Row]:
    yield "file", "LoRA"
    for field, name in _LORA_METADATA.items():
        if metadata.get(field):
            yield name, f"{metadata[field]} ({field})"
    yield "weights", _dtypes(tensors)
    endings = Counter(_ending(name) for name in tensors)
    yield "tensors", ", ".join(f"{count} {ending}" for ending, count in sorted(endings.items()))
    lora = summarise(file)
    yield "family", lora.model
    yield "layout", f"{lora.layout} ({', '.join(lora.methods)})"
    yield "layers", str(lora.layers)
    yield "ranks", ", ".join(map(str, lora.ranks))
    if lora.embeddings:
        yield "embeddings", ", ".join(lora.embeddings)
    if lora.trigger_words:
        yield "trigger words", ", ".join(lora.trigger_words)
    yield "can be served", "with --lora and a model of this family, whose layers it is compared with then"


def _ending(name: str) -> str:
    """What a tensor of a LoRA is of its layer, such as `lora_down.weight` or `alpha`."""
    before, _, last = name.rpartition(".")
    return f"{before.rpartition('.')[2]}.{last}" if last in ("weight", "bias") and "." in before else last


def _dtypes(tensors: Mapping[str, Any]) -> str:
    return ", ".join(sorted({entry["dtype"] for entry in tensors.values()}))


def _find_configuration(given: str, checkpoint: Checkpoint, configuration: str | None) -> Path | None:
    if configuration is None:
        return single_file.find_configuration(given, checkpoint, store.local_folder)
    if (folder := store.local_folder(configuration)) is None:
        raise SettingError("single_file_config", f"{configuration} is not on this machine.")
    return folder


def _check_checkpoint(given: str, folder: Path) -> Report:
    """Check a checkpoint with a configuration as the store would combine them."""
    chosen, selection = single_file.select(
        given,
        str(folder),
        ModelOptions(),
        lambda _: folder,
        prefer_fp16=False,
        check_pipeline=lambda _: None,
        check_files=lambda _: None,
        report_progress=lambda _: None,
    )
    with single_file.linked(chosen, selection) as entry:
        return check_in_process(entry)


def _served(report: Report, pipeline: str) -> Iterator[Row]:
    examples: dict[str, list[str]] = {}
    for tensor, reason in report.ignored.items():
        examples.setdefault(reason, []).append(tensor)
    for reason, names in examples.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield "ignored", f"{names[0]}{more}: {reason}"
    if report.fault:
        raise ModelError(report.fault)
    yield "can be served", "with --refiner and an SDXL model" if pipeline == REFINER_PIPELINE else "yes"
