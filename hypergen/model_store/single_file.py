"""Checkpoints in one file: where the configuration comes from that such a file lacks.

A file has weights and no word on how to use them. `diffusers` keeps that in folders: configurations,
vocabularies, the scheduler, and the parts that a file may leave out, as most of FLUX leave out all but the
transformer. The file and what it lacks become one entry of the model store.
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
    missing_parts,
    pipeline_class_of,
    read_components,
    safetensors_header,
    select_in_folder,
)
from hypergen.model_store.hub import HUB_ID, cached_folders, download, look_up

SUFFIX = ".safetensors"
# From the name of a model to its folder, where it is on this machine already.
Find = Callable[[str], Path | None]


def select(
    given: str, configuration: str | None, half: bool, find: Find, say: Callable[[str], None]
) -> tuple[Path, Selection]:
    """The files that make a model of a checkpoint: a folder with configuration, and what to take from there.

    Args:
        given: the file.
        configuration: folder, hub id or tag of the store that the operator named; absent: looked for.
        half: see `select_files`.

    Raises:
        ModelError: the file is no whole checkpoint, or nothing that would make a model of it is at hand.
    """
    file = Path(os.path.expanduser(given)).absolute()
    if file.suffix != SUFFIX:
        raise ModelError(f"{given} is no folder and no {SUFFIX} file: only these are loaded.")
    checkpoint = read_checkpoint(safetensors_header(file, str(file.parent), file.name), given)
    folder = _named(configuration, checkpoint, half, find, say) if configuration else None
    folder = folder or _beside(file, checkpoint) or find(checkpoint.usual_source)
    if folder is None:
        try:
            folder = _from_hub(checkpoint.usual_source, checkpoint, half, say)
        except ModelError as error:
            raise ModelError(
                f"{given} needs the configuration of its model, usually {checkpoint.usual_source}; give a "
                f"folder, hub id or store tag that has it with --single-file-config. ({error})"
            ) from None
    pipeline_class = pipeline_class_of(folder, str(folder))
    if pipeline_class not in checkpoint.pipelines:
        raise ModelError(
            f"{given} is of a {checkpoint.pipelines[0]}, and the configuration in {folder} of a "
            f"{pipeline_class}."
        )
    lacking = missing_parts(folder, checkpoint.components)
    if lacking:
        raise ModelError(
            f"{given} holds no {', '.join(lacking)}, and {folder} no weights for it; give a whole model with "
            "--single-file-config."
        )
    selection = _without_weights(select_in_folder(folder, half=half), checkpoint.components)
    return folder, replace(selection, files={**selection.files, CHECKPOINT: str(file)})


def _named(
    configuration: str, checkpoint: Checkpoint, half: bool, find: Find, say: Callable[[str], None]
) -> Path:
    if (folder := find(configuration)) is not None:
        return folder
    if HUB_ID.fullmatch(configuration):
        return _from_hub(configuration, checkpoint, half, say)
    raise ModelError(f"No such folder, hub id or store tag for --single-file-config: {configuration}")


def _beside(file: Path, checkpoint: Checkpoint) -> Path | None:
    """Its own folder, as in repositories that publish both, or one of the file's name."""
    for folder in (file.parent, file.with_suffix("")):
        if (folder / PIPELINE_FILE).is_file() and pipeline_class_of(folder, str(folder)) in (
            checkpoint.pipelines
        ):
            return folder
    return None


def _from_hub(repo: str, checkpoint: Checkpoint, half: bool, say: Callable[[str], None]) -> Path:
    """The folder in the hub's cache, which is asked first; only what the checkpoint lacks is downloaded."""
    for folder in cached_folders(repo):
        parts = read_components(folder / PIPELINE_FILE, repo).keys() - {OPTIONAL}
        there = all((folder / part).is_dir() for part in parts)
        if there and not missing_parts(folder, checkpoint.components):
            return folder
    say(f"Asking the hub about {repo}")
    model = look_up(repo, revision=None, half=half, check=lambda _: None)
    selection = _without_weights(model.selection, checkpoint.components)
    say(f"Downloading what the checkpoint lacks of {repo}: {len(selection.files)} files")
    return download(replace(model, selection=selection))


def _without_weights(selection: Selection, components: Collection[str]) -> Selection:
    """A selection less the weights of parts that come from elsewhere."""

    def is_weights(name: str) -> bool:
        return name.endswith(".safetensors") or ".index." in name

    files = {
        stored: name
        for stored, name in selection.files.items()
        if stored.partition("/")[0] not in components or not is_weights(stored)
    }
    return replace(selection, files=files)
