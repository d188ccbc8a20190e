"""The environment variables of engine processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from hypergen.model_store.entries import state_folder

_PACKAGE_PARENT = Path(__file__).resolve().parents[2]
_ADDED = {
    # An engine must not use the network.
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    # Busy-waiting threads made a forward pass 100 times slower next to another busy process.
    "OMP_WAIT_POLICY": "passive",
}


def engine_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment for an engine, with `more` added."""
    # An engine does not need the key, so it does not get it.
    environment = {name: value for name, value in os.environ.items() if name != "HYPERGEN_API_KEY"}
    python_path = [str(_PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Images of any size fragment the memory of a GPU otherwise.
    if not any(name in environment for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    # torch's default is a temporary folder, so that a container would compile at each start.
    if "TORCHINDUCTOR_CACHE_DIR" not in environment:
        with suppress(OSError):
            environment["TORCHINDUCTOR_CACHE_DIR"] = str(state_folder() / "torchinductor")
    return environment | {"PYTHONPATH": os.pathsep.join(python_path)} | _ADDED | dict(more or {})
