"""Single-file checkpoints: find the configuration and the components that the file lacks.

A checkpoint has only weights, and sometimes not all of them: most FLUX files have only the transformer. The
configurations, vocabularies, scheduler and missing components come from a folder in diffusers layout. Both
become one entry of the model store.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hypergen.errors import ModelError, SettingError
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
from hypergen.model_store.hub import (
    HUB_ID,
    Check,
    HubModel,
    cached_folders,
    download,
    linked,
    resolve_hub_model,
    write_headers,
)
from hypergen.served_model_config import ModelOptions

SUFFIX = ".safetensors"
# Returns the folder of a model that is on this machine, else None.
FindLocalFolder = Callable[[str], Path | None]
ReportProgress = Callable[[str], None]


def select(
    given: str,
    configuration: str | None,
    options: ModelOptions,
    find_local_folder: FindLocalFolder,
    *,
    prefer_fp16: bool,
    check_pipeline: Check,
    check_files: Check,
    report_progress: ReportProgress,
) -> tuple[Path, Selection]:
    """The configuration folder of a checkpoint, and the files to store: selected ones and the checkpoint.

    Args:
        given: the checkpoint file.
        configuration: folder, hub id or store tag from --single-file-config; None: searched next to the file,
            in the store and on the hub.
        options: of its served-model file.
        prefer_fp16: see `select_files`.
        check_pipeline, check_files: see `get_or_import`.

    Raises:
        ModelError: the file is not a complete checkpoint, or its configuration is not found.
    """
    file = Path(os.path.expanduser(given)).absolute()
    if file.suffix != SUFFIX:
        raise ModelError(other_suffix(given))
    checkpoint = read_checkpoint(safetensors_header(file, str(file.parent), file.name), given)

    def check(pipeline_file: Path) -> None:
        pipeline_class = pipeline_class_of(pipeline_file.parent, str(pipeline_file.parent))
        if pipeline_class not in checkpoint.pipelines:
            raise ModelError(
                f"{given} is a checkpoint of a {checkpoint.pipelines[0]}, but the configuration in "
                f"{configuration or pipeline_file.parent} is of a {pipeline_class}."
            )
        check_pipeline(pipeline_file)

    folder = find_local_folder(configuration) if configuration else _folder_next_to(file, checkpoint)
    if folder is None:
        source = configuration or checkpoint.usual_source(given, options)
        if not HUB_ID.fullmatch(source):
            raise SettingError("single_file_config", f"{source}: no such folder, hub id or store tag.")
        folder = (None if configuration else find_local_folder(source)) or _cached_folder(source, checkpoint)
        if folder is None:
            report_progress(f"Looking up {source} on the hub")
            try:
                model = resolve_hub_model(source, revision=None, prefer_fp16=prefer_fp16, check=check)
            except ModelError as error:
                if configuration:
                    raise
                raise ModelError(
                    f"{given} needs the configuration of its model, usually {source}; give a "
                    f"folder, hub id or store tag that has it with --single-file-config. ({error})"
                ) from None
            folder = _download(model, file, checkpoint, check_files, report_progress)
    check(folder / PIPELINE_FILE)
    missing = missing_components(folder, checkpoint.components)
    if missing:
        raise ModelError(
            f"Neither {given} nor {folder} has weights for {', '.join(missing)}; give a complete model with "
            "--single-file-config."
        )
    selection = select_in_folder(folder, prefer_fp16=prefer_fp16).without_weights(checkpoint.components)
    return folder, _with_checkpoint(selection, file)


def other_suffix(given: str) -> str:
    """The message for a file that is no safetensors file."""
    return f"{given} must be a folder or a {SUFFIX} file; docs/models.md shows how to convert others."


def find_configuration(given: str, checkpoint: Checkpoint, find_local_folder: FindLocalFolder) -> Path | None:
    """The configuration folder that `select` would take, if it is on this machine."""
    if (folder := _folder_next_to(Path(os.path.expanduser(given)).absolute(), checkpoint)) is not None:
        return folder
    source = checkpoint.usual_source(given, ModelOptions())
    return find_local_folder(source) or _cached_folder(source, checkpoint)


def _with_checkpoint(selection: Selection, file: Path) -> Selection:
    return replace(selection, files={**selection.files, CHECKPOINT: str(file)})


def _folder_next_to(file: Path, checkpoint: Checkpoint) -> Path | None:
    """The file's own folder, as in repositories that publish both, or a folder with the file's name."""
    for folder in (file.parent, file.with_suffix("")):
        if (folder / PIPELINE_FILE).is_file() and pipeline_class_of(folder, str(folder)) in (
            checkpoint.pipelines
        ):
            return folder
    return None


def _cached_folder(repo: str, checkpoint: Checkpoint) -> Path | None:
    """The model's folder in the hub's cache, if it has everything that the checkpoint lacks."""
    for folder in cached_folders(repo):
        components = read_components(folder / PIPELINE_FILE, repo).keys() - {OPTIONAL}
        has_folders = all((folder / component).is_dir() for component in components)
        if has_folders and not missing_components(folder, checkpoint.components):
            return folder
    return None


def _download(
    model: HubModel, file: Path, checkpoint: Checkpoint, check_files: Check, report_progress: ReportProgress
) -> Path:
    """Download what the checkpoint lacks: first configurations and headers, for the check, then weights."""
    configurations = model.selection.without_weights()
    folder = download(replace(model, selection=configurations))
    selection = model.selection.without_weights(checkpoint.components)
    with linked(folder, _with_checkpoint(configurations, file)) as entry:
        write_headers(model, selection, entry)
        check_files(entry)
    repo, count = model.repo, len(selection.files)
    report_progress(f"Downloading the files of {repo} that the checkpoint lacks: {count}")
    return download(replace(model, selection=selection))
