"""The LoRA registry of a server, and how requests name LoRAs."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from hypergen.api.dialects import openai_images
from hypergen.config import EngineSettings, Settings
from hypergen.errors import ConfigurationError, InvalidRequestError
from hypergen.load_settings import environment_of, load_settings
from hypergen.model_info import ModelDefaults, ModelInfo
from hypergen.model_store.lora_files import name_of, open_registry


def _file(path: Path, shapes: dict[str, list[int]] | None = None) -> Path:
    """A safetensors file of zeros."""
    header: dict[str, Any] = {}
    end = 0
    for key, shape in (shapes or {"unet.x.lora_A.weight": [4, 2]}).items():
        size = 2
        for side in shape:
            size *= side
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end := end + size]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    return path


def _settings(**changes: Any) -> EngineSettings:
    return EngineSettings.model_validate(changes)


@pytest.fixture
def lora_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LoRA folder with a file outside, and links and special files that try to escape."""
    folder = tmp_path / "loras"
    _file(folder / "ink.safetensors")
    _file(folder / "styles" / "oil paint.safetensors")
    _file(tmp_path / "secret.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "zero.safetensors").symlink_to("/dev/zero")
    (folder / "up").symlink_to(tmp_path)
    (folder / "inside.safetensors").symlink_to(folder / "ink.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(folder)  # the name of a socket is limited to about a hundred bytes
        listener.bind("socket.safetensors")
    (folder / "pickle.bin").write_bytes(b"x")
    (folder / "folder.safetensors").mkdir()
    return folder


def test_names_come_from_flags_folders_and_the_model(lora_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    _file(model / "loras" / "Pixel_Art.safetensors")
    other = _file(tmp_path / "other" / "a=b.safetensors")
    settings = _settings(lora=[f"Logo={other}", str(tmp_path / "secret.safetensors")], lora_dir=[lora_folder])
    registry = open_registry(settings, model)
    assert registry.default == "secret"
    assert registry.files["Logo"] == other
    names = {"Logo", "secret", "ink", "styles/oil paint", "Pixel_Art", "inside"}
    assert names <= registry.files.keys()
    assert not {"link", "pipe", "socket", "folder", "loop", "pickle"} & registry.files.keys()


@pytest.mark.parametrize(
    "name", ["a, b", "[ill] x", "it's", "b&w", "new!", "#1", "90%", "~x", "me@site", "(v2) a+b", "x/[y], z"]
)
def test_names_of_published_files_are_offered(name: str, tmp_path: Path) -> None:
    _file(tmp_path / f"{name}.safetensors")
    model_info = _model_info(tmp_path)
    assert model_info.loras == (name,)
    assert _loras(model_info, lora_path=name) == ((name, 1.0),)
    assert _loras(model_info, lora_path=f"{name}.safetensors") == ((name, 1.0),)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora": ["{0}/nothing.safetensors"]}, "no such .safetensors file"),
        ({"lora": ["x={0}/pickle.bin"]}, "no such .safetensors file"),
        ({"lora_dir": ["{0}/nothing"]}, "no such folder"),
        ({"lora": ["a\nb={0}/ink.safetensors"]}, "is not a valid name"),
        ({"lora": ["={0}/ink.safetensors"]}, "is not a valid name"),
        ({"lora": ["{0}/ink.safetensors", "{0}/inside.safetensors"]}, "only one"),
        (
            {"lora": ["ink={0}/styles/oil paint.safetensors"], "lora_dir": ["{0}"]},
            "has two with the name ink",
        ),
        ({"lora_dir": ["{0}:{0}"]}, "must not contain ':'"),
    ],
)
def test_invalid_lora_settings_are_an_error_at_startup(
    lora_folder: Path, given: dict[str, list[str]], message: str
) -> None:
    filled = {name: tuple(item.format(lora_folder) for item in items) for name, items in given.items()}
    with pytest.raises(ConfigurationError, match=message):
        open_registry(_settings(**filled), None)


def test_lists_can_be_set_by_environment_and_yaml(tmp_path: Path) -> None:
    flags = {"lora": ("a=/x/a.safetensors", "/y/b c.safetensors"), "lora_dir": (Path("/l"), Path("/m"))}
    environment = environment_of(flags)
    assert environment["HYPERGEN_LORA"] == "a=/x/a.safetensors:/y/b c.safetensors"
    file = tmp_path / "settings.yaml"
    file.write_text("engine: {lora: ['a=/x/a.safetensors', '/y/b c.safetensors'], lora_dir: [/l, /m]}")
    for settings in (load_settings(environment=environment), load_settings(file)):
        assert settings.engine.lora == flags["lora"]
        assert settings.engine.lora_dir == flags["lora_dir"]
    assert load_settings(file, flags={"lora": ()}).engine.lora == flags["lora"]


def _model_info(lora_folder: Path, **changes: Any) -> ModelInfo:
    registry = open_registry(_settings(lora_dir=[lora_folder]), None)
    fields: dict[str, Any] = {
        "loras": tuple(registry.files),
        "lora_folders": (str(lora_folder),),
        "max_loras": 2,
    }
    return ModelInfo(
        id="small",
        family="sd",
        defaults=ModelDefaults(4, 5.0, 64, 64),
        samplers={},
        min_steps=1,
        device="cpu",
        dtype="float32",
        **{**fields, **changes},
    )


def _loras(model_info: ModelInfo, **fields: Any) -> tuple[tuple[str, float], ...]:
    validated = openai_images.to_request(
        {"prompt": "a", **fields}, model_info, Settings.model_validate({}).server, "1"
    )
    return validated.generation.loras


def test_requests_name_a_lora_by_name_or_path(lora_folder: Path) -> None:
    model_info = _model_info(lora_folder)
    assert _loras(model_info) == ()
    assert _loras(model_info, lora_path="ink") == (("ink", 1.0),)
    assert _loras(model_info, lora_path=str(lora_folder / "ink.safetensors"), lora_scale=2) == (("ink", 2.0),)
    assert _loras(model_info, lora_path="styles/oil paint.safetensors") == (("styles/oil paint", 1.0),)
    assert _loras(model_info, loras={"styles/oil paint": 0.5, "ink": 1}) == (
        ("ink", 1.0),
        ("styles/oil paint", 0.5),
    )
    assert _loras(model_info, lora_path="ink", lora_scale=0) == ()
    assert _loras(model_info, loras={}) == ()
    _file(lora_folder / "later.safetensors")
    assert _loras(model_info, lora_path=str(lora_folder / "later.safetensors")) == (("later", 1.0),)
    registry = open_registry(_settings(lora_dir=[lora_folder]), None)
    assert registry.path_of("later") == lora_folder / "later.safetensors"


def test_the_default_lora_is_for_requests_without_one(lora_folder: Path) -> None:
    model_info = _model_info(lora_folder, default_lora="ink")
    assert _loras(model_info) == (("ink", 1.0),)
    assert _loras(model_info, lora_scale=0.5) == (("ink", 0.5),)
    assert _loras(model_info, lora_scale=0) == ()
    assert _loras(model_info, lora_path="styles/oil paint") == (("styles/oil paint", 1.0),)
    assert _loras(model_info, loras={}) == ()


def test_everything_outside_the_registry_gets_the_same_error(lora_folder: Path) -> None:
    model_info = _model_info(lora_folder)
    outside = lora_folder.parent / "secret.safetensors"
    attempts = [
        "",
        "nothing",
        "nothing.safetensors",
        "ink.safetensors\0",
        "../secret.safetensors",
        f"{lora_folder}/../secret.safetensors",
        f"{lora_folder}/../loras/ink.safetensors",
        str(outside),
        str(lora_folder.parent / "nothing.safetensors"),
        f"{lora_folder}/up/secret.safetensors",
        f"file://{lora_folder}/ink.safetensors",
        "https://host/ink.safetensors",
        "~/ink.safetensors",
        "$HOME/ink.safetensors",
        "\uff0e\uff0e/secret.safetensors",
        "a" * 5000 + ".safetensors",
        *[
            f"{lora_folder}/{name}.safetensors"
            for name in ("link", "loop", "zero", "pipe", "socket", "folder")
        ],
        f"{lora_folder}/pickle.bin",
        "/dev/zero",
        "/proc/self/environ",
    ]
    for field, messages in (("lora_path", set[str]()), ("loras", set[str]())):
        for text in attempts:
            with pytest.raises(InvalidRequestError) as refused:
                _loras(model_info, **{field: text if field == "lora_path" else {text: 1.0}})
            assert refused.value.param == field
            messages.add(refused.value.message)
        assert len(messages) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"loras": {"ink": 2.1}}, "loras"),
        ({"loras": {"ink": -0.1}}, "loras"),
        ({"loras": {"ink": True}}, "loras"),
        ({"loras": {"ink": "1"}}, "loras"),
        ({"loras": ["ink"]}, "loras"),
        ({"loras": {"ink": 1, "styles/oil paint": 1, "inside": 1}}, "loras"),
        ({"loras": {"ink": 1, "ink.safetensors": 1}}, "loras"),
        ({"loras": {"ink": 1}, "lora_path": "ink"}, "loras"),
        ({"lora_path": "ink", "lora_scale": 2.5}, "lora_scale"),
    ],
)
def test_invalid_weights_and_too_many_loras_are_errors(
    lora_folder: Path, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        _loras(_model_info(lora_folder), **fields)
    assert refused.value.param == param


def test_the_engine_rejects_unknown_names_too(lora_folder: Path) -> None:
    registry = open_registry(_settings(lora_dir=[lora_folder]), None)
    for name in ("nothing", "../secret", "link", "up/secret", "a\0b", "pipe"):
        with pytest.raises(InvalidRequestError):
            registry.path_of(name)
    assert name_of("/dev/null", (), ()) is None
