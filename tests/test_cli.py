"""The command line, as a shell runs it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.live import free_port, start_server


def hypergen(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hypergen.cli", *arguments],
        env={**os.environ, "BENTOML_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=home,
    )


def assert_one_line_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in errors[0]


@pytest.mark.parametrize("command", ["serve", "generate", "models", "import"])
def test_help_names_units_and_defaults(tmp_path: Path, command: str) -> None:
    result = hypergen(tmp_path, command, "--help")
    assert result.returncode == 0
    if command == "serve":
        text = " ".join(result.stdout.split())
        for flag in ("--host", "--port", "--device", "--dtype", "--api-key", "--api-key-file", "--config"):
            assert f"{flag} " in text
        for flag in (
            "--max-queue-size",
            "--max-batch-size",
            "--reload",
            "--served-model-name",
            "--public-url",
        ):
            assert f"{flag} " in text
        assert re.search(r"--queue-timeout FLOAT seconds .*?\[default: 600\]", text)
        assert re.search(r"--request-timeout FLOAT seconds .*?\[default: 3600\]", text)
        assert re.search(r"--determinism \[strict\|fast\] .*?\[default: strict\]", text)
        assert "--device [cuda|cpu|mps]" in text
        assert "--dtype [float16|bfloat16|float32]" in text


def test_generate_draws_the_same_bytes_as_a_server(tmp_path: Path, sd_folder: Path) -> None:
    options = ("--steps", "3", "--seed", "5", "--size", "64x72", "--device", "cpu", "--dtype", "float32")
    result = hypergen(tmp_path, "generate", "a cat", "-m", str(sd_folder), *options, "-o", "cat.png")
    assert result.returncode == 0, result.stderr
    assert "cat.png (seed 5)" in result.stderr
    with Image.open(tmp_path / "cat.png") as image:
        assert image.size == (64, 72)
    again = hypergen(
        tmp_path, "generate", "a cat", "-m", str(sd_folder), *options, "-n", "2", "-o", "two.png"
    )
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "two-0.png").read_bytes() == (tmp_path / "cat.png").read_bytes()
    assert (tmp_path / "two-1.png").exists()


def test_generate_says_what_is_wrong_in_one_line(tmp_path: Path, sd_folder: Path) -> None:
    model = ("-m", str(sd_folder))
    assert_one_line_error(hypergen(tmp_path, "generate", "a", *model, "-o", "a.gif"), "a.gif", ".png")
    wrong = hypergen(tmp_path, "generate", "a", *model, "-o", "a.png", "--steps", "151")
    assert_one_line_error(wrong, "num_inference_steps")


def test_a_model_is_imported_listed_and_served_by_its_tag(tmp_path: Path, sd_folder: Path) -> None:
    imported = hypergen(tmp_path, "import", str(sd_folder))
    tag = imported.stdout.strip()
    assert imported.returncode == 0
    listed = hypergen(tmp_path, "models").stdout
    assert tag in listed
    assert str(sd_folder) in listed
    with start_server(tmp_path, tag, environment={"BENTOML_HOME": str(tmp_path)}) as server:
        assert server.openai().models.list().data[0].id == tag


def test_serve_refuses_within_seconds_what_cannot_work(tmp_path: Path, sd_folder: Path) -> None:
    started = time.monotonic()
    assert_one_line_error(hypergen(tmp_path, "serve", "nosuch"), "nosuch", "folder", "tag")
    assert_one_line_error(hypergen(tmp_path, "serve", "./nosuch"), "./nosuch")
    (tmp_path / "empty").mkdir()
    assert_one_line_error(hypergen(tmp_path, "serve", "./empty"), "model_index.json")
    assert_one_line_error(hypergen(tmp_path, "serve", HYPERGEN_PROT="1"), "HYPERGEN_PROT")
    assert_one_line_error(hypergen(tmp_path, "serve", "--api-key-file", "nosuch"), "nosuch")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_one_line_error(hypergen(tmp_path, "serve", str(sd_folder), "--port", port), port, "--port")
    assert time.monotonic() - started < 60


def test_serve_ends_when_the_first_load_fails(tmp_path: Path, sd_folder: Path) -> None:
    result = hypergen(tmp_path, "serve", str(sd_folder), "--device", "mps", "--port", str(free_port()))
    assert_one_line_error(result, "no mps device")


def test_a_reloading_server_starts_again_when_the_source_changes(tmp_path: Path, sd_folder: Path) -> None:
    with start_server(tmp_path, str(sd_folder), "--device", "cpu", "--reload") as server:
        before = server.engine().pid
        source = Path(__file__).parents[1] / "hypergen" / "__init__.py"
        source.touch()
        until = time.monotonic() + 60
        while time.monotonic() < until:
            time.sleep(0.5)
            try:
                if server.health()["status"] == "healthy" and server.engine().pid != before:
                    break
            except (httpx.HTTPError, StopIteration):
                continue
        assert server.engine().pid != before
