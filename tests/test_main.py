"""The command line, run as a subprocess."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.support.live_server import LiveServer, copy_imported, free_port, start_server


def hypergen(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hypergen.cli.main", *arguments],
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
    for word in words:
        assert word in errors[0]


HELP = {
    "serve": [
        r"--host TEXT address .*?\[default: 127.0.0.1\]",
        r"--port INTEGER TCP port .*?\[default: 8000\]",
        r"--device \[cuda\|cpu\|mps\]",
        r"--dtype \[float16\|bfloat16\|float32\]",
        r"--api-key TEXT",
        r"--api-key-file PATH",
        r"--config FILE",
        r"--reload",
        r"--served-model-name TEXT",
        r"--public-url TEXT",
        r"--max-queue-size INTEGER requests .*?\[default: 100\]",
        r"--max-batch-size INTEGER images .*?\[default: 8\]",
        r"--queue-timeout FLOAT seconds .*?\[default: 600\]",
        r"--request-timeout FLOAT seconds .*?\[default: 3600\]",
        r"--controlnet TEXT ControlNet .*?NAME=SOURCE[^\[\]]*--",
        r"--determinism \[strict\|fast\] .*?\[default: strict\]",
    ],
    "generate": [
        r"--output FILE .*?\[required\]",
        r"--size TEXT WIDTHxHEIGHT in pixels",
        r"--steps INTEGER denoising steps, 1 to 150",
        r"-n INTEGER .*?\[default: 1\]",
        r"--guidance-scale FLOAT 1 to 20",
    ],
    "models": [r"List the models"],
    "import": [r"a hub id, a folder or a file", r"--revision TEXT"],
    "loras": [r"--lora TEXT .*?NAME=PATH", r"--lora-dir PATH .*?several times"],
}


@pytest.mark.parametrize("command", HELP)
def test_help_has_options_units_and_defaults(tmp_path: Path, command: str) -> None:
    result = hypergen(tmp_path, command, "--help")
    assert result.returncode == 0
    text = " ".join(result.stdout.split())
    for pattern in HELP[command]:
        assert re.search(pattern, text), pattern


def test_generate_writes_the_same_bytes_as_a_server(
    tmp_path: Path, sd_folder: Path, server: LiveServer
) -> None:
    copy_imported(str(sd_folder), tmp_path)
    model = ("-m", str(sd_folder), "--device", "cpu", "--dtype", "float32")
    options = ("--steps", "3", "--seed", "5", "--size", "64x72", "-n", "2")
    result = hypergen(tmp_path, "generate", "a cat", *model, *options, "-o", "cat.png")
    assert result.returncode == 0, result.stderr
    assert "cat-0.png (seed 5)" in result.stderr
    served = server.openai().images.generate(
        prompt="a cat", n=2, size="64x72", extra_body={"seed": 5, "num_inference_steps": 3}
    )
    assert served.data
    for index, image in enumerate(served.data):
        assert (tmp_path / f"cat-{index}.png").read_bytes() == base64.b64decode(image.b64_json or "")


def test_generate_uses_the_given_loras(
    tmp_path: Path, sd_folder: Path, lora_folder: Path, server: LiveServer
) -> None:
    copy_imported(str(sd_folder), tmp_path)
    options = ("-m", str(sd_folder), "--device", "cpu", "--dtype", "float32", "--steps", "2", "--seed", "5")
    lora = ("--size", "64x64", "--lora", f"{lora_folder}/style.safetensors:0.5")
    result = hypergen(tmp_path, "generate", "a cat", *options, *lora, "-o", "cat.png")
    assert result.returncode == 0, result.stderr
    extra = {"seed": 5, "num_inference_steps": 2, "loras": {"style": 0.5}}
    served = server.openai().images.generate(prompt="a cat", size="64x64", extra_body=extra)
    assert served.data
    assert (tmp_path / "cat.png").read_bytes() == base64.b64decode(served.data[0].b64_json or "")


def test_loras_are_listed_and_missing_files_are_an_error(
    tmp_path: Path, sd_folder: Path, lora_folder: Path
) -> None:
    listed = hypergen(tmp_path, "loras", str(sd_folder), "--lora-dir", str(lora_folder))
    assert listed.returncode == 0, listed.stderr
    lines = [re.split(r"  +", line) for line in listed.stdout.splitlines()]
    assert lines[0] == ["NAME", "MODEL", "LAYOUT", "RANK", "SIZE"]
    assert lines[2][0] == "style"
    assert lines[2][2:4] == ["diffusers", "4"]
    assert "damaged" in listed.stdout
    missing = hypergen(tmp_path, "loras", HYPERGEN_LORA=f"{lora_folder}/nothing.safetensors")
    assert_one_line_error(missing, "nothing.safetensors")


def test_generate_prints_errors_in_one_line(tmp_path: Path, sd_folder: Path) -> None:
    model = ("-m", str(sd_folder))
    assert_one_line_error(hypergen(tmp_path, "generate", "a", *model, "-o", "a.gif"), "a.gif", ".png")
    wrong = hypergen(tmp_path, "generate", "a", *model, "-o", "a.png", "--steps", "151")
    assert_one_line_error(wrong, "--steps")


def test_a_model_is_imported_listed_and_served_by_its_tag(tmp_path: Path, sd_folder: Path) -> None:
    imported = hypergen(tmp_path, "import", str(sd_folder))
    tag = imported.stdout.strip()
    assert imported.returncode == 0
    listed = hypergen(tmp_path, "models").stdout
    assert tag in listed
    assert str(sd_folder) in listed
    with start_server(tmp_path, tag, environment={"BENTOML_HOME": str(tmp_path)}) as server:
        assert server.openai().models.list().data[0].id == tag


def test_serve_rejects_invalid_arguments_within_seconds(tmp_path: Path, sd_folder: Path) -> None:
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


def test_serve_rejects_an_unknown_pipeline_class(tmp_path: Path, sd_folder: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(sd_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "NonsensePipeline"}))
    assert_one_line_error(hypergen(tmp_path, "serve", str(folder)), "NonsensePipeline", "diffusers")


def test_serve_refuses_a_model_that_cannot_be_loaded(tmp_path: Path, sd_folder: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(sd_folder, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "block_out_channels": [32, 96]}))
    result = hypergen(tmp_path, "serve", str(folder), "--port", str(free_port()))
    assert_one_line_error(result, "gives the unet a shape of [64]")
    assert "TAG" in hypergen(tmp_path, "models").stdout
    assert "odd" not in hypergen(tmp_path, "models").stdout


def test_serve_exits_when_the_first_load_fails(tmp_path: Path, sd_folder: Path) -> None:
    """Networks of a model in the store are not compared with their weights before the load."""
    tag = hypergen(tmp_path, "import", str(sd_folder)).stdout.strip()
    config = tmp_path / "models" / tag.replace(":", "/") / "unet/config.json"
    text = config.read_text()
    damaged = text.replace('"cross_attention_dim": 32', '"cross_attention_dim": 64')
    assert damaged != text
    config.write_text(damaged)
    result = hypergen(tmp_path, "serve", tag, "--port", str(free_port()))
    assert_one_line_error(result, "could not be loaded", "needs [64, 64]")


def test_a_relative_key_file_is_resolved(tmp_path: Path, sd_folder: Path) -> None:
    (tmp_path / "keys.txt").write_text("sk-from-the-file\n")
    arguments = (str(sd_folder), "--device", "cpu", "--api-key-file", "keys.txt")
    with start_server(tmp_path, *arguments) as server:
        models = f"{server.url}/v1/models"
        assert httpx.get(models).status_code == 401
        key = {"Authorization": "Bearer sk-from-the-file"}
        assert httpx.get(models, headers=key).status_code == 200


def test_reload_restarts_the_server_when_the_source_changes(tmp_path: Path, sd_folder: Path) -> None:
    with start_server(tmp_path, str(sd_folder), "--device", "cpu", "--reload") as server:
        before = server.engine().pid
        source = Path(__file__).parents[1] / "hypergen" / "__init__.py"
        touched_at = -math.inf
        until = time.monotonic() + 120
        while time.monotonic() < until:
            # Repeated, because the file watcher may start after the server is ready.
            if time.monotonic() - touched_at > 25:
                source.touch()
                touched_at = time.monotonic()
            time.sleep(0.5)
            try:
                if server.health()["status"] == "healthy" and server.engine().pid != before:
                    break
            except (httpx.HTTPError, StopIteration):
                continue
        assert server.engine().pid != before
