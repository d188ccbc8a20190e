"""Bad values: one line that names what the user wrote, before a model is imported or loaded.

The exit status is 1, and 2 for what is no command line: an unknown option, or a text for a number.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Run, refuse

FILES = {
    "text.txt": "not a model\n",
    "text.safetensors": "not a model\n",
    "empty/note.txt": "",
    "unknown.yaml": "# a model\nsorce: ./sd\n",
    "range.yaml": "source: ./sd\ndefaults:\n  num_inference_steps: 0\n",
    "sampler.yaml": "source: ./sd\nscheduler: eular\n",
    "broken.yaml": "source: ./sd\naliases: [\n",
    "elsewhere.yaml": "source: ../nosuch\n",
    "bare.yaml": "port: 8000\n",
    "section.yaml": "server:\n  host: 127.0.0.1\n  prot: 8000\n",
    "models.yaml": "models:\n- ./sd\n- source: ./sd\n  lroas: {}\n",
    "keys.txt": "# no key\n",
}
SERVE = {
    "--lora-dir nosuch": "--lora-dir nosuch: no such folder",
    "--lora-dir text.txt": "--lora-dir text.txt: no such folder",
    "--lora nosuch.safetensors": "--lora nosuch.safetensors: no such",
    "--controlnet canny=nosuch": "'canny': no such folder: nosuch",
    "--embedding cat=nosuch.pt": "'cat': no such",
    "--refiner nosuch": "'nosuch'",
    "--api-key-file nosuch": "nosuch cannot be read",
    "--api-key-file empty": "empty cannot be read",
    "--api-key-file keys.txt": "keys.txt has no key",
    "--ssl-certfile nosuch --ssl-keyfile text.txt": "--ssl-certfile nosuch cannot be read",
    "--ssl-certfile text.txt --ssl-keyfile text.txt": "must be a certificate and its key",
    "--ssl-certfile text.txt": "must be given together",
    "--c2pa-certificate text.txt": "c2pa_key': certificate and key must be given together.",
    "--safety-checker nosuch": "--safety-checker nosuch: no such folder, hub id or module:function",
    "--safety-checker ./empty": "empty has no preprocessor_config.json",
    "--safety-checker nosuch:check": "--safety-checker nosuch:check: no module nosuch",
    "--jobs http://127.0.0.1:6379": "--jobs: must be redis://HOST:PORT/DATABASE",
    "--jobs redis://127.0.0.1:6379/first": "--jobs: must be redis://HOST:PORT/DATABASE",
    "--jobs redis://:word@127.0.0.1:1/0": "--jobs redis://127.0.0.1:1/0 cannot be used: ",
    "--max-steps 0": "--max-steps: ",
    "--queue-timeout nan": "--queue-timeout: ",
    "--storage images": "--storage: must be s3://BUCKET or s3://BUCKET/PREFIX",
    "--storage s3://images/../other": "--storage: must be s3://BUCKET or s3://BUCKET/PREFIX",
    "--storage s3://images --url-storage-mb 5": "--url-storage-mb: cannot be combined with --storage",
    "--storage s3://images --url-lifetime 700000": "--url-lifetime: must be at most 604800 with --storage",
    "--storage-public-url https://s3.example.com": "--storage-public-url: needs --storage",
    "--storage s3://images --storage-public-url s3.example.com": "--storage-public-url: must be a scheme and",
    "--devices foo": "--devices: must be all, or devices such as cuda:0,cuda:1",
    "--devices cpu,all": "--devices: must be all, or devices such as cuda:0,cuda:1",
    "--devices cuda:0,cuda:1,cuda:0": "--devices: has cuda:0 twice",
    "--devices cuda:0,cpu": "--devices: must be devices of one type",
    "--device cpu --devices cuda:0": "--devices: must be of the type that --device has, cpu",
    "--devices cuda:99": "--devices cuda:99: no such device; this machine has",
    "--host 203.0.113.7": "--host 203.0.113.7 cannot be used: ",
    "--config nosuch": "nosuch cannot be read",
    "--config bare.yaml": "bare.yaml, line 1: Unknown setting 'port'; did you mean server.port?",
    "--config section.yaml": "section.yaml, line 3: Unknown setting 'server.prot'; did you mean server.port",
}
MODELS = {
    "nosuch": "Unknown model 'nosuch'",
    "./nosuch": "No such folder: ./nosuch",
    "./nosuch.safetensors": "No such file: ./nosuch.safetensors",
    "text.txt": "text.txt must be a folder or a .safetensors file",
    "text.safetensors": "text.safetensors",
    "./empty": "empty has no model_index.json",
    "unknown.yaml": "unknown.yaml, line 2: Unknown setting 'sorce'; did you mean source?",
    "range.yaml": "range.yaml, line 3: Setting 'defaults.num_inference_steps': ",
    "sampler.yaml": "sampler.yaml, line 2: Setting 'scheduler': must be one of ddim, ",
    "broken.yaml": "broken.yaml, line 3, is not YAML: ",
    "elsewhere.yaml": "No such folder: ",
    "nosuch.yaml": "nosuch.yaml cannot be read",
}
GENERATE = {
    "--steps 0": "--steps should be greater than or equal to 1 (given: 0)",
    "--steps 151": "--steps should be less than or equal to 150 (given: 151)",
    "--size 7x7": "--size: Invalid size format: 7x7",
    "--size 512": "--size: Invalid size format: 512",
    "--size 100x100": "--size must have a width and height divisible by 8, not 100x100",
    "--lora nosuch": "--lora nosuch: no such file, and no LoRA of the model",
    "--embedding cat=nosuch.pt": "'cat': no such",
    "--sampler eular": "--sampler 'eular' is unknown",
    "--sampler dpmpp_sde --steps 1": "--steps must be at least 2 with the dpmpp_sde sampler",
    "--guidance-scale nan": "--guidance-scale should be a finite number (given: nan)",
    "--guidance-scale 21": "--guidance-scale should be less than or equal to 20",
    "--seed 9223372036854775808": "--seed should be less than or equal to 9223372036854775807",
    "--seed 9223372036854775807 -n 2": "--seed is too large",
    "-n 11": "-n should be less than or equal to 10 (given: 11)",
    "--lora-dir text.txt": "--lora-dir text.txt: no such folder",
    "--output nosuch/cat.png": "--output nosuch/cat.png: no such folder: nosuch",
    "--output cat.gif": "--output cat.gif must be one of .jpeg, .jpg, .png, .webp",
    "--from text.txt": "text.txt",
    "--from nosuch.png": "nosuch.png",
}


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "work"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "sd").symlink_to(sd_folder)
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("arguments", SERVE)
def test_serve_refuses_a_setting(hypergen: Run, home: Path, arguments: str) -> None:
    refuse(hypergen, home, ["serve", "./sd", *arguments.split()], SERVE[arguments])


@pytest.mark.parametrize("command", ["serve", "generate"])
@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_refused(hypergen: Run, home: Path, command: str, model: str) -> None:
    given = (
        ["serve", "./sd", model] if command == "serve" else ["generate", "cat", "-o", "a.png", "-m", model]
    )
    refuse(hypergen, home, given, MODELS[model])


@pytest.mark.parametrize("arguments", GENERATE)
def test_generate_refuses_an_option(hypergen: Run, home: Path, arguments: str) -> None:
    given = ["generate", "cat", "-m", "./sd", "-o", "cat.png", *arguments.split()]
    refuse(hypergen, home, given, GENERATE[arguments])


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HYPERGEN_MAX_STEPS", "0"),
        ("HYPERGEN_PROT", "1"),
        ("HYPERGEN_API_KEY", " "),
        ("HYPERGEN_PORT", "tcp"),
    ],
)
def test_a_variable_is_named(
    hypergen: Run, home: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    refuse(hypergen, home, ["serve", "./sd"], variable)


def test_variables_of_kubernetes_services_of_any_name_are_no_settings(
    hypergen: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for service in ("HYPERGEN", "HYPERGEN_GPU", "HYPERGEN_MAX_STEPS"):
        monkeypatch.setenv(f"{service}_SERVICE_HOST", "10.0.0.1")
        monkeypatch.setenv(f"{service}_SERVICE_PORT_HTTP", "8000")
        monkeypatch.setenv(f"{service}_PORT", "tcp://10.0.0.1:8000")
        monkeypatch.setenv(f"{service}_PORT_8000_TCP", "tcp://10.0.0.1:8000")
        monkeypatch.setenv(f"{service}_PORT_8000_TCP_PROTO", "tcp")
    assert (
        hypergen("check", "ok.yaml" if Path("ok.yaml").write_text("source: hypergen-tiny\n") else "")[0] == 0
    )


def test_a_port_in_use_is_refused(hypergen: Run, home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refuse(
            hypergen, home, ["serve", "./sd", "--port", port], f"--port {port} cannot be used on 127.0.0.1"
        )


@pytest.mark.parametrize("option", [["--steps", "x"], ["--setps", "4"], ["--size"]])
def test_what_is_no_command_line_is_status_2(hypergen: Run, option: list[str]) -> None:
    status, error = hypergen("generate", "cat", "-o", "cat.png", *option)
    assert status == 2
    assert option[0] in error.splitlines()[-1]


@pytest.mark.parametrize("home", ["work/text.txt", "/proc/nosuch"])
def test_a_store_that_cannot_be_used_is_refused(tmp_path: Path, home: str) -> None:
    """In a process of its own, because BentoML finds its home once."""
    done = subprocess.run(
        [sys.executable, "-m", "hypergen.cli.main", "generate", "cat", "-m", "./sd", "-o", "cat.png"],
        env={**os.environ, "BENTOML_HOME": str(tmp_path / home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: BENTOML_HOME, ")
    assert done.stderr.count("\n") == 1


def test_an_unwritable_folder_is_refused(hypergen: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # permissions do not bind root
    refuse(
        hypergen,
        home,
        ["generate", "cat", "-m", "./sd", "-o", "cat.png"],
        "--output cat.png cannot be written",
    )
