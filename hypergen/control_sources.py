"""Where control models come from, looked at without torch before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from hypergen.errors import ModelError
from hypergen.hub import HUB_ID, with_revision
from hypergen.model_folder import check_component


def find_control_models(sources: Mapping[str, str]) -> dict[str, str]:
    """The same sources with folders as whole paths; a hub id, which may end in
    @REVISION, stays as it is, and the engine gets its files.

    Raises:
        ModelError: a folder does not exist, or is no whole model with safetensors weights.
    """
    found: dict[str, str] = {}
    for name, source in sources.items():
        path = Path(os.path.expanduser(source)).resolve()
        if path.is_dir():
            check_component(path.parent, path.name, "ControlNetModel")
            found[name] = str(path)
        elif HUB_ID.fullmatch(with_revision(source)[0]):
            found[name] = source
        else:
            raise ModelError(f"Control model '{name}': no such folder: {source}")
    return found
