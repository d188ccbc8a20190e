"""`hypergen check`: what would be served, or the fault, without a load."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hypergen.model_store.sources import EMBEDDED_FOLDER
from tests.cli.conftest import Run


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sd").symlink_to(EMBEDDED_FOLDER)
    monkeypatch.chdir(tmp_path)


def rows(output: str) -> list[tuple[str, str]]:
    return [(name, value.strip()) for name, _, value in (line.partition(":") for line in output.splitlines())]


def test_a_served_model_file_is_shown_and_nothing_is_imported(hypergen: Run, home: Path) -> None:
    # Relative to the file's folder, which is not the working folder.
    Path("models/model.yaml").write_text("source: sd\nname: small\naliases: [tiny, little]\n")
    status, output = hypergen("check", "models/model.yaml")
    assert status == 0
    assert rows(output)[:3] == [
        ("model", "small"),
        ("aliases", "tiny, little"),
        ("pipeline", "StableDiffusionPipeline"),
    ]
    assert not list(home.glob("models/*"))


def test_a_file_of_settings_is_shown(
    hypergen: Run, lora_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPERGEN_API_KEY", "secret")
    Path("server.yaml").write_text(
        f"models: [hypergen-tiny]\nserver: {{port: 8123}}\nengine: {{lora_dir: ['{lora_folder}']}}\n"
    )
    status, output = hypergen("check", "server.yaml")
    assert status == 0
    found = dict(rows(output))
    assert found["model"] == "hypergen-tiny"
    assert {"style", "Pixel_Art"} <= set(found["LoRAs"].split(", "))
    assert found["address"] == "http://127.0.0.1:8123"
    assert found["API keys"] == "yes"
    assert "secret" not in output


def test_a_model_of_the_hub_is_not_looked_up(hypergen: Run) -> None:
    Path("model.yaml").write_text("source: owner/name\n")
    status, output = hypergen("check", "model.yaml")
    assert status == 0
    assert dict(rows(output))["source"] == "the hub, downloaded when served"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sources: models/sd\n", "f.yaml, line 1: Unknown setting 'sources'; did you mean source?"),
        (
            "source: hypergen-tiny\nlroas: {}\n",
            "f.yaml, line 2: Unknown setting 'lroas'; did you mean loras?",
        ),
        ("models: []\nprot: 1\n", "f.yaml, line 2: Unknown setting 'prot'; did you mean server.port"),
        ("server:\n  port: -1\n", "f.yaml, line 2: Setting 'server.port': "),
        ("models: [./nosuch]\n", "f.yaml, line 1: No such folder: ./nosuch"),
        (
            "models: [hypergen-tiny]\nserver: {api_key_file: nosuch}\n",
            "f.yaml, line 2: server.api_key_file nosuch cannot be read",
        ),
    ],
)
def test_a_fault_is_one_line_with_its_place(hypergen: Run, text: str, words: str) -> None:
    Path("f.yaml").write_text(text)
    status, error = hypergen("check", "f.yaml")
    assert status == 1
    assert error.startswith(f"Error: {words}")
    assert error.count("\n") == 1


def test_a_model_whose_tensors_do_not_fit_is_refused(hypergen: Run, sd_folder: Path) -> None:
    shutil.copytree(sd_folder, "odd")
    config = Path("odd/unet/config.json")
    config.write_text(config.read_text().replace('"in_channels": 4', '"in_channels": 5'))
    Path("odd.yaml").write_text("source: ./odd\n")
    status, error = hypergen("check", "odd.yaml")
    assert status == 1
    assert "unet" in error
