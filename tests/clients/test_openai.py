"""OpenAI's official clients, each in its own process, against a real server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.support.image_files import as_file, gradient
from tests.support.live_server import LiveServer
from tests.support.packages import node_packages, python_packages

HERE = Path(__file__).parent
# The previous major version, with a package that only it needs.
PREVIOUS = ("openai==2.54.0", "distro==1.9.0")


def run_checks(server: LiveServer, folder: Path, *command: str, **environment: str) -> list[str]:
    """The lines that a script printed: one per passed check."""
    variables = {**os.environ, "BASE_URL": server.url, "API_KEY": server.api_key or "unused", **environment}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("major", [2, 3])
def test_the_python_client_passes_all_checks(keyed_server: LiveServer, tmp_path: Path, major: int) -> None:
    paths = {"PYTHONPATH": str(python_packages(*PREVIOUS))} if major == 2 else {}
    script = HERE / "speak_openai.py"
    version, *passed = run_checks(keyed_server, tmp_path, sys.executable, str(script), **paths)
    assert int(version.partition(".")[0]) == major
    checks = re.findall(r"^def (check_\w+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(passed) == sorted(checks)
    assert len(checks) == 8


def test_the_installed_client_is_the_current_major_version() -> None:
    assert openai.__version__.startswith("3.")


@pytest.mark.parametrize("package", ["openai", "openai-6"])
def test_the_node_client_passes_all_checks(keyed_server: LiveServer, tmp_path: Path, package: str) -> None:
    node = node_packages(HERE / "node")
    image = tmp_path / "image.png"
    image.write_bytes(as_file(gradient(128, 128)))
    script = str(HERE / "node" / "speak.mjs")
    passed = run_checks(keyed_server, tmp_path, node, script, package, INPUT_IMAGE=str(image))
    assert passed == ["models", "generations", "edits", "variations", "streams", "errors"]
