"""Check a model folder without reading its weights:
`python -m hypergen.models.check_model FOLDER OPTIONS SETTINGS`.

The HTTP process, which does not import torch, runs it before it downloads the weights of a model, and before
it adds the model to the store. Prints one line of JSON: see `Report`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
from diffusers import SchedulerMixin
from transformers import PreTrainedTokenizerBase

from hypergen.config import EngineSettings
from hypergen.errors import ModelError, SettingError
from hypergen.model_families import PIPELINES, REFINER_PIPELINE, FamilySpec
from hypergen.model_store.checkpoint_file import is_edm_checkpoint, options_of
from hypergen.model_store.diffusers_layout import CHECKPOINT, components_in_checkpoint, pipeline_class_of
from hypergen.model_store.model_check import Report
from hypergen.models.check_arguments import check_arguments
from hypergen.models.diffusers_pipeline import require_text_to_image
from hypergen.models.folder_accounting import account_for_folder
from hypergen.models.model_options import check_configurations, with_options
from hypergen.models.networks import DAMAGED, component_classes, empty_network, one_line
from hypergen.models.single_file_loading import account_for, changed_channels
from hypergen.models.tensor_accounting import Account
from hypergen.served_model_config import ModelOptions


def check_model(path: Path, options: ModelOptions, settings: EngineSettings) -> Report:
    """What loading the model would refuse.

    Args:
        options: of its served-model file.
    """
    ignored: dict[str, str] = {}
    try:
        of_file = account_for(path) if (path / CHECKPOINT).is_file() else Account()
        in_file = dict.fromkeys(components_in_checkpoint(path))
        for account in (of_file, account_for_folder(path, in_file)):
            ignored |= account.ignored
            if account.fault:
                raise ModelError(account.fault)
        _check_configurations(path, options)
        check_arguments(path, options, settings)
    except SettingError as error:
        return Report(error.reason, ignored, error.setting, error.item)
    except ModelError as error:
        return Report(str(error), ignored)
    except DAMAGED as error:
        return Report(one_line(error), ignored)
    return Report(None, ignored)


def _check_configurations(path: Path, options: ModelOptions) -> None:
    parts: dict[str, Any] = {}
    classes = dict(component_classes(path))
    for name, component_class in classes.items():
        if issubclass(component_class, (SchedulerMixin, PreTrainedTokenizerBase)):
            try:
                parts[name] = component_class.from_pretrained(path / name, local_files_only=True)
            except DAMAGED as error:
                raise ModelError(f"The folder's {name} cannot be loaded: {one_line(error)}") from None
    name = pipeline_class_of(path, str(path))
    if name in PIPELINES:
        _check_family(path, PIPELINES[name], classes, parts["scheduler"], options)
    elif name != REFINER_PIPELINE:
        require_text_to_image(getattr(diffusers, name))


def _check_family(
    path: Path, spec: FamilySpec, classes: dict[str, Any], scheduler: Any, options: ModelOptions
) -> None:
    options = options_of(path, options)
    scheduler = with_options(scheduler, options, is_edm_model=is_edm_checkpoint(path))
    check_configurations(path, spec, scheduler, classes["vae"])
    denoiser = "unet" if "unet" in classes else "transformer"
    spec.import_class().find_inpaint_model(
        empty_network(path / denoiser, classes[denoiser], **changed_channels(path)),
        empty_network(path / "vae", classes["vae"]),
    )


if __name__ == "__main__":
    given = ModelOptions.model_validate_json(sys.argv[2])
    chosen = EngineSettings.model_validate_json(sys.argv[3])
    print(json.dumps(asdict(check_model(Path(sys.argv[1]), given, chosen))))
