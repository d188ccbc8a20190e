"""Writes the settings of pip, uv and buildah for scripts/build_image, from those of this machine's pip.

    python scripts/build_settings.py FOLDER

FOLDER has containers.conf; build.conf becomes the same with the mounts that the build needs: both files,
certificates and folders of wheels.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def pip_settings() -> dict[str, list[str]]:
    """Name -> values, of pip's files and environment; those of the environment come first in pip's list."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    settings: dict[str, list[str]] = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        settings.setdefault(name.rpartition(".")[2], value.strip("'").split())
    return {name: settings[name] for name in ("cert", "find-links", "index-url") if name in settings}


def write_settings(folder: Path) -> None:
    settings = pip_settings()
    lines = [f"{name} = {' '.join(values)}" for name, values in settings.items()]
    (folder / "pip.conf").write_text("\n".join(["[global]", *lines, ""]), encoding="utf-8")

    uv = ["system-certs = true", f"find-links = {json.dumps(settings.get('find-links', []))}"]
    uv += [f"index-url = {json.dumps(url)}" for url in settings.get("index-url", [])]
    (folder / "uv.toml").write_text("\n".join([*uv, ""]), encoding="utf-8")

    local = [*settings.get("find-links", []), *settings.get("cert", [])]
    mounts = [f"{path}:{path}:ro" for path in local if Path(path).exists()]
    mounts += [f"{folder}/pip.conf:/etc/pip.conf:ro", f"{folder}/uv.toml:/etc/uv/uv.toml:ro"]
    containers = (folder / "containers.conf").read_text(encoding="utf-8")
    mounted = containers.replace("[containers]", f"[containers]\nvolumes = {json.dumps(mounts)}")
    (folder / "build.conf").write_text(mounted, encoding="utf-8")


if __name__ == "__main__":
    write_settings(Path(sys.argv[1]))
