"""Client packages outside the environment: installed on first use, into ignored folders."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache"


def python_packages(*requirements: str) -> Path:
    """A folder with these packages alone, for PYTHONPATH; their dependencies are in the environment."""
    folder = CACHE / "-".join(requirements).replace("==", "-")
    if not folder.is_dir():
        new = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(new)]
        subprocess.run([*install, *requirements], check=True, timeout=240)
        new.rename(folder)
    return folder


def node_packages(folder: Path) -> str:
    """Install the packages of the folder's lock file into it; returns the path of node."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    lock, stamp = folder / "package-lock.json", folder / "node_modules" / ".made-from"
    if not stamp.is_file() or stamp.read_bytes() != lock.read_bytes():
        subprocess.run(
            [npm, "ci", "--silent", "--no-audit", "--no-fund"], cwd=folder, check=True, timeout=240
        )
        stamp.write_bytes(lock.read_bytes())
    return node
