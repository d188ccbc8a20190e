"""OpenAI's official clients, each in a process of its own, against the real server."""

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
# The major version before the environment's, with the one package that only it needs.
BEFORE = ("openai==2.54.0", "distro==1.9.0")


def speak(server: LiveServer, folder: Path, *command: str, **environment: str) -> list[str]:
    """The lines that a script printed, of which it prints one for each check that passed."""
    given = {**os.environ, "BASE_URL": server.url, "API_KEY": server.api_key or "unused", **environment}
    done = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("major", [2, 3])
def test_pythons_client_is_understood(keyed_server: LiveServer, tmp_path: Path, major: int) -> None:
    paths = {"PYTHONPATH": str(python_packages(*BEFORE))} if major == 2 else {}
    script = HERE / "speak_openai.py"
    version, *passed = speak(keyed_server, tmp_path, sys.executable, str(script), **paths)
    assert int(version.partition(".")[0]) == major
    checks = re.findall(r"^def (check_\w+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(passed) == sorted(checks)
    assert len(checks) == 8


def test_the_environments_client_is_the_current_one() -> None:
    assert openai.__version__.startswith("3.")


@pytest.mark.parametrize("package", ["openai", "openai-6"])
def test_nodes_client_is_understood(keyed_server: LiveServer, tmp_path: Path, package: str) -> None:
    node = node_packages(HERE / "node")
    picture = tmp_path / "picture.png"
    picture.write_bytes(as_file(gradient(128, 128)))
    script = str(HERE / "node" / "speak.mjs")
    passed = speak(keyed_server, tmp_path, node, script, package, PICTURE=str(picture))
    assert passed == ["models", "generations", "edits", "variations", "streams", "errors"]
