"""Several models from flags, the environment and files, and configuration errors at startup."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from hypergen.errors import ConfigurationError, HyperGenError
from hypergen.load_settings import load_settings
from hypergen.resolve_models import find_models, resolved_entries
from hypergen.served_model_config import as_json
from tests.support.lora_files import ATTENTION, save_lora


def _write(folder: Path, text: str, name: str = "model.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_a_served_model_file_sets_all_properties_of_a_model(tmp_path: Path, sd_folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    save_lora(tmp_path / "logo.safetensors", pipeline, rank=4, targets=ATTENTION, seed=1)
    torch.save(torch.zeros(1, 32), tmp_path / "ink.pt")
    file = _write(
        tmp_path,
        f"source: {sd_folder}\nname: owner/small\naliases: [SD1.5, small]\n"
        "defaults: {num_inference_steps: 3, width: 64}\n"
        "loras: {Logo: logo.safetensors, Later: '', Never: null}\n"
        "embeddings: {ink: ink.pt}\n",
    )
    (model,) = find_models(load_settings(flags={"models": (str(file),)}))
    assert model.id == "owner/small"
    assert all(model.is_called(name) for name in ("owner/small", "sd1.5", "SMALL"))
    assert not model.is_called("large")
    assert model.defaults == {"num_inference_steps": 3, "width": 64}
    assert model.settings.lora == (f"Logo={tmp_path / 'logo.safetensors'}",)
    assert model.settings.embedding == {"ink": str(tmp_path / "ink.pt")}


def test_models_are_the_same_in_a_child_process(tmp_path: Path, sd_folder: Path) -> None:
    file = _write(tmp_path, f"source: {sd_folder}\naliases: [other]\ndefaults: {{guidance_scale: 2}}\n")
    settings = load_settings(flags={"models": (str(file), "hypergen-tiny")})
    found = find_models(settings)
    text = as_json(resolved_entries(settings, found))
    assert find_models(load_settings(environment={"HYPERGEN_MODELS": text})) == found
    assert [model.id for model in found] == [str(sd_folder), "hypergen-tiny"]
    short = load_settings(environment={"HYPERGEN_MODELS": f"{sd_folder},hypergen-tiny"})
    assert [entry.source for entry in short.models] == [str(sd_folder), "hypergen-tiny"]


def test_a_configuration_file_lists_models(tmp_path: Path, sd_folder: Path) -> None:
    one = _write(tmp_path, f"source: {sd_folder}\n")
    file = _write(tmp_path, f"models: [{one}, {{source: hypergen-tiny, name: tiny}}]\n", "server.yaml")
    assert [model.id for model in find_models(load_settings(file))] == [str(sd_folder), "tiny"]
    # The environment overrides the file, and flags override both.
    by_environment = load_settings(file, environment={"HYPERGEN_MODELS": "hypergen-tiny"})
    by_flag = load_settings(file, flags={"models": ("hypergen-tiny",)})
    by_name_alone = load_settings(_write(tmp_path, "models: hypergen-tiny\n", "single.yaml"))
    for settings in (by_environment, by_flag, by_name_alone):
        assert [model.id for model in find_models(settings)] == ["hypergen-tiny"]


@pytest.mark.parametrize(
    ("models", "flags", "message"),
    [
        (["hypergen-tiny", "hypergen-tiny"], {}, "Two models have the name 'hypergen-tiny'"),
        (
            [{"source": "hypergen-tiny", "aliases": ["X"]}, {"source": "hypergen-tiny", "name": "x"}],
            {},
            "'x'",
        ),
        (["hypergen-tiny", {"name": "b"}], {"refiner": "/there"}, "refiner applies to one model"),
        (["hypergen-tiny", {"name": "b"}], {"served_model_name": "c"}, "served_model_name applies to one"),
        (["/nowhere.yaml"], {}, "/nowhere.yaml cannot be read: No such file"),
        ([{"sorce": "x"}], {}, "Unknown setting 'models.0.sorce'"),
        ([{"defaults": {"width": 65}}], {}, "models.0.defaults.width"),
        ([{"loras": {"Logo": "/nowhere.safetensors"}}], {}, "/nowhere.safetensors"),
        (
            [{"embeddings": {"ink": "/nowhere.pt"}}],
            {},
            "no such .safetensors or .pt or .bin file: /nowhere.pt",
        ),
        (["hypergen-tiny", {"name": "b"}], {"embedding": ("ink=/ink.pt",)}, "embedding applies to one"),
        ([{"refiner": "/nowhere"}], {}, "refiner is only supported for sdxl models; this is sd."),
    ],
)
def test_errors_are_one_line(models: list[object], flags: dict[str, object], message: str) -> None:
    with pytest.raises(HyperGenError) as raised:
        find_models(load_settings(flags={**flags, "models": models}))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_shipped_file_is_found_by_its_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings(flags={"models": ("embedded.yaml",)}).models[0].source == "hypergen-tiny"
    _write(tmp_path, "source: other\n", "embedded.yaml")  # a local file has precedence
    assert load_settings(flags={"models": ("embedded.yaml",)}).models[0].source == "other"
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_settings(flags={"models": ("elsewhere/embedded.yaml",)})
