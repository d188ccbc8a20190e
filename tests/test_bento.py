"""A Bento: what `bentoml build` puts into it, and that it serves the models that it was built with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from scripts.make_requirements import make_requirements
from tests.support.live_server import LiveServer, copy_imported, free_port, start_server

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "hypergen" / "embedded"


def run_bentoml(home: Path, *arguments: str, **environment: str) -> str:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("HYPERGEN_")}
    environment = {**outside, "BENTOML_HOME": str(home), "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "bentoml", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bento(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Path:
    """A Bento of two models as an image has it: its folder, with its models inside."""
    folder = tmp_path_factory.mktemp("bento")
    variables = {"HYPERGEN_MODELS": f"{sd_folder},{EMBEDDED}"}
    arguments = ("--arg", "torch_backend=cu130", "--arg", "strict=true")
    copy_imported(str(sd_folder), folder / "home")
    tag = run_bentoml(folder / "home", "build", "--output", "tag", *arguments, **variables)
    tag = tag.strip().removeprefix("__tag__:")
    run_bentoml(folder / "home", "export", tag, str(folder / "bento.tar"))
    with tarfile.open(folder / "bento.tar") as archive:
        archive.extractall(folder / "bento", filter="data")
    return folder / "bento"


@pytest.fixture(scope="module")
def manifest(bento: Path) -> dict[str, Any]:
    return yaml.safe_load((bento / "bento.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def bento_server(bento: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The Bento served from an empty folder, with an empty store and no settings."""
    with start_server(
        tmp_path_factory.mktemp("empty"),
        str(bento),
        "--host",
        "127.0.0.1",
        program=(sys.executable, "-m", "bentoml", "serve"),
        environment={"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    ) as server:
        yield server


def test_a_bento_serves_the_models_it_was_built_with(bento_server: LiveServer, sd_folder: Path) -> None:
    names = [model.id for model in bento_server.openai().models.list().data]
    assert names == [str(sd_folder), str(EMBEDDED)]
    for name in names:
        body = {"model": name, "prompt": "a cat", "num_inference_steps": 2, "size": "64x64"}
        response = httpx.post(f"{bento_server.url}/v1/images/generations", json=body, timeout=120)
        assert response.status_code == 200, response.text


def test_settings_given_as_arguments_are_those_of_the_bento(bento_server: LiveServer) -> None:
    body = {"prompt": "a cat", "num_inference_steps": 2, "size": "64x64", "colour": "red"}
    response = httpx.post(f"{bento_server.url}/v1/images/generations", json=body, timeout=120)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "colour")


def test_the_packages_are_those_of_requirements_txt_once(bento: Path) -> None:
    lines = (bento / "env/python/requirements.txt").read_text(encoding="utf-8").split()
    packages = [line for line in lines if "==" in line and not line.startswith("bentoml==")]
    wanted = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert packages == [line for line in wanted if "==" in line and not line.startswith("bentoml==")]


def test_requirements_txt_is_current() -> None:
    assert (ROOT / "requirements.txt").read_text(encoding="utf-8") == make_requirements()


def test_the_image_has_no_compilers_and_the_torch_build_of_the_argument(
    bento: Path, manifest: dict[str, Any]
) -> None:
    dockerfile = (bento / "env/docker/Dockerfile").read_text(encoding="utf-8")
    assert "apt-get" not in dockerfile
    assert "ARG UV_TORCH_BACKEND=cu130\n" in dockerfile
    assert manifest["services"][0]["config"]["resources"] == {"gpu": 1}
    assert manifest["labels"]["project"] == "hypergen"


def test_the_bento_has_no_development_files(bento: Path) -> None:
    files = {str(path.relative_to(bento / "src")) for path in (bento / "src").rglob("*") if path.is_file()}
    assert {"service.py", "configs/sdxl.yaml", "requirements.txt", "README.md"} <= files
    unwanted = ("tests/", "scripts/", "docs/", "configs/deploy/", "configs/grafana/")
    assert not [file for file in files if file.startswith(unwanted) or "__pycache__" in file]


def test_what_the_service_declares_is_not_in_bentofile_yaml() -> None:
    # BentoML merges both: the file's image options win, and its packages are added to the service's.
    assert yaml.safe_load((ROOT / "bentofile.yaml").read_text(encoding="utf-8")).keys() == {
        "service",
        "include",
    }


def test_a_wrong_argument_ends_the_build_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bentoml", "build", "--arg", "torch_backend=gpu"]
    environment = {**os.environ, "BENTOML_HOME": str(tmp_path)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr == (
        "Error: Argument 'torch_backend' must be cpu, xpu, or a version such as cu130 or rocm7.1 "
        "(given: 'gpu').\n"
    )


def serve_that_ends(
    bento: Path, folder: Path, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bentoml", "serve", str(bento), "--host", "127.0.0.1", *arguments]
    environment = {
        **os.environ,
        "BENTOML_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
        **variables,
    }
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=240
    )


def test_a_port_in_use_ends_bentoml_serve_with_one_line(
    bento: Path, bento_server: LiveServer, tmp_path: Path
) -> None:
    port = str(httpx.URL(bento_server.url).port)
    done = serve_that_ends(bento, tmp_path, "--port", port)
    assert done.returncode == 1
    *before, error = done.stderr.splitlines()
    assert error == f"Error: port {port} cannot be used on 127.0.0.1: Address already in use."
    assert all(" INFO Service loaded " in line for line in before)


def test_a_bento_without_its_models_ends_with_one_line(bento: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bento, tmp_path / "bento", ignore=shutil.ignore_patterns("models"), symlinks=True)
    done = serve_that_ends(copy, tmp_path, "--port", str(free_port()))
    assert done.returncode == 1
    assert re.fullmatch(r"Error: .*\n", done.stderr)


def test_a_wrong_key_file_ends_bentoml_serve_with_one_line(bento: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-1 name=client\n")
    arguments = ("--port", str(free_port()))
    done = serve_that_ends(bento, tmp_path, *arguments, HYPERGEN_API_KEY_FILE=str(tmp_path / "keys"))
    assert done.returncode == 1
    assert re.fullmatch(r"Error: .*/keys, line 1: name: Extra inputs are not permitted\.\n", done.stderr)
