"""Single-file checkpoints: find the configuration and the components that the file lacks.

A checkpoint has only weights, and sometimes not all of them: most FLUX files have only the transformer. The
configurations, vocabularies, scheduler and missing components come from a folder in diffusers layout. Both
become one entry of the model store.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from hypergen.errors import ModelError
from hypergen.model_store.checkpoint_detection import Checkpoint, read_checkpoint
from hypergen.model_store.diffusers_layout import (
    CHECKPOINT,
    OPTIONAL,
    PIPELINE_FILE,
    Selection,
    missing_components,
    pipeline_class_of,
    read_components,
    safetensors_header,
    select_in_folder,
)
from hypergen.model_store.hub import HUB_ID, cached_folders, download, resolve_hub_model
from hypergen.served_model_config import ModelOptions

SUFFIX = ".safetensors"
# Returns the folder of a model that is on this machine, else None.
FindLocalFolder = Callable[[str], Path | None]
ReportProgress = Callable[[str], None]


def select(
    given: str,
    configuration: str | None,
    options: ModelOptions,
    prefer_fp16: bool,
    find_local_folder: FindLocalFolder,
    report_progress: ReportProgress,
) -> tuple[Path, Selection]:
    """The configuration folder of a checkpoint, and the files to store: selected ones and the checkpoint.

    Args:
        given: the checkpoint file.
        configuration: folder, hub id or store tag from --single-file-config; None: searched next to the file,
            in the store and on the hub.
        options: of its served-model file.
        prefer_fp16: see `select_files`.

    Raises:
        ModelError: the file is not a complete checkpoint, or its configuration is not found.
    """
    file = Path(os.path.expanduser(given)).absolute()
    if file.suffix != SUFFIX:
        raise ModelError(f"{given} must be a folder or a {SUFFIX} file.")
    checkpoint = read_checkpoint(safetensors_header(file, str(file.parent), file.name), given)
    folder = None
    if configuration:
        folder = _given_folder(configuration, checkpoint, prefer_fp16, find_local_folder, report_progress)
    folder = folder or _folder_next_to(file, checkpoint)
    source = "" if folder else checkpoint.usual_source(given, options)
    folder = folder or find_local_folder(source)
    if folder is None:
        try:
            folder = _hub_folder(source, checkpoint, prefer_fp16, report_progress)
        except ModelError as error:
            raise ModelError(
                f"{given} needs the configuration of its model, usually {source}; give a "
                f"folder, hub id or store tag that has it with --single-file-config. ({error})"
            ) from None
    pipeline_class = pipeline_class_of(folder, str(folder))
    if pipeline_class not in checkpoint.pipelines:
        raise ModelError(
            f"{given} is a checkpoint of a {checkpoint.pipelines[0]}, but the configuration in {folder} is "
            f"of a {pipeline_class}."
        )
    missing = missing_components(folder, checkpoint.components)
    if missing:
        raise ModelError(
            f"Neither {given} nor {folder} has weights for {', '.join(missing)}; give a complete model with "
            "--single-file-config."
        )
    selection = _without_weights(select_in_folder(folder, prefer_fp16=prefer_fp16), checkpoint.components)
    return folder, replace(selection, files={**selection.files, CHECKPOINT: str(file)})


def find_configuration(given: str, checkpoint: Checkpoint, find_local_folder: FindLocalFolder) -> Path | None:
    """The configuration folder that `select` would take, if it is on this machine."""
    file = Path(os.path.expanduser(given)).absolute()
    if (folder := _folder_next_to(file, checkpoint)) is not None:
        return folder
    source = checkpoint.usual_source(given, ModelOptions())
    complete = (f for f in cached_folders(source) if not missing_components(f, checkpoint.components))
    return find_local_folder(source) or next(complete, None)


def _given_folder(
    configuration: str,
    checkpoint: Checkpoint,
    prefer_fp16: bool,
    find_local_folder: FindLocalFolder,
    report_progress: ReportProgress,
) -> Path:
    if (folder := find_local_folder(configuration)) is not None:
        return folder
    if HUB_ID.fullmatch(configuration):
        return _hub_folder(configuration, checkpoint, prefer_fp16, report_progress)
    raise ModelError(f"No such folder, hub id or store tag for --single-file-config: {configuration}")


def _folder_next_to(file: Path, checkpoint: Checkpoint) -> Path | None:
    """The file's own folder, as in repositories that publish both, or a folder with the file's name."""
    for folder in (file.parent, file.with_suffix("")):
        if (folder / PIPELINE_FILE).is_file() and pipeline_class_of(folder, str(folder)) in (
            checkpoint.pipelines
        ):
            return folder
    return None


def _hub_folder(
    repo: str, checkpoint: Checkpoint, prefer_fp16: bool, report_progress: ReportProgress
) -> Path:
    """The model's folder in the hub's cache; files that are neither cached nor in the checkpoint are
    downloaded.
    """
    for folder in cached_folders(repo):
        components = read_components(folder / PIPELINE_FILE, repo).keys() - {OPTIONAL}
        has_folders = all((folder / component).is_dir() for component in components)
        if has_folders and not missing_components(folder, checkpoint.components):
            return folder
    report_progress(f"Looking up {repo} on the hub")
    model = resolve_hub_model(repo, revision=None, prefer_fp16=prefer_fp16, check=lambda _: None)
    selection = _without_weights(model.selection, checkpoint.components)
    report_progress(f"Downloading the files of {repo} that the checkpoint lacks: {len(selection.files)}")
    return download(replace(model, selection=selection))


def _without_weights(selection: Selection, components: Collection[str]) -> Selection:
    """A selection without the weights of these components."""

    def is_weights(name: str) -> bool:
        return name.endswith(".safetensors") or ".index." in name

    files = {
        stored: name
        for stored, name in selection.files.items()
        if stored.partition("/")[0] not in components or not is_weights(stored)
    }
    return replace(selection, files=files)
