"""Check a model folder without reading its weights: `python -m hypergen.models.check_model FOLDER`.

The HTTP process, which does not import torch, runs it before it adds a model to the store. Prints one line of
JSON: what the model's files have no use for, and the first thing that does not fit.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from hypergen.errors import ModelError
from hypergen.model_families import PIPELINES, REFINER_PIPELINE
from hypergen.model_store.diffusers_layout import CHECKPOINT, pipeline_class_of
from hypergen.model_store.model_check import Report
from hypergen.models.folder_accounting import account_for_folder
from hypergen.models.model_options import check_configurations
from hypergen.models.networks import component_classes
from hypergen.models.single_file_loading import account_for


def check_model(path: Path) -> Report:
    """What loading the model would refuse, apart from settings."""
    try:
        account = account_for(path) if (path / CHECKPOINT).is_file() else account_for_folder(path, {})
        if account.fault is None:
            _check_family(path)
    except ModelError as error:
        return Report(str(error), {})
    return Report(account.fault, account.ignored)


def _check_family(path: Path) -> None:
    name = pipeline_class_of(path, str(path))
    if name not in PIPELINES or name == REFINER_PIPELINE:
        return
    classes = dict(component_classes(path))
    scheduler = classes["scheduler"].from_pretrained(path / "scheduler", local_files_only=True)
    check_configurations(path, PIPELINES[name], scheduler, classes["vae"])


if __name__ == "__main__":
    print(json.dumps(asdict(check_model(Path(sys.argv[1])))))
