"""The main memory that an engine may use for the weights of evicted models."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil

from hypergen.config import EngineSettings

# The rest is for what else runs, and for files that the system keeps in memory.
_SHARE = 0.5
_CGROUP = Path("/sys/fs/cgroup")


def limit_bytes(settings: EngineSettings, engines: int) -> float:
    """Bytes for one of the server's engines: by the settings, else a share of what is free now."""
    if settings.host_memory_gb is not None:
        return settings.host_memory_gb * 1e9
    return _SHARE * free_bytes() / engines


def free_bytes(cgroup: Path = _CGROUP) -> int:
    """Bytes that processes can still take, within the limit of a container."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError, KeyError):  # not Linux, or without a limit, which is the text "max"
        limit = int((cgroup / "memory.max").read_text(encoding="ascii"))
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
        lines = (cgroup / "memory.stat").read_text(encoding="ascii").splitlines()
        # Files that were read count as used, but give way.
        files = int(dict(line.split() for line in lines)["inactive_file"])
        free = min(free, limit - used + files)
    return max(0, free)
