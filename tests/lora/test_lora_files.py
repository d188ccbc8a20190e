"""Which LoRAs a server offers, and what a request may call them."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from hypergen.api.dialects import openai_images
from hypergen.config import EngineSettings, Settings
from hypergen.errors import ConfigurationError, InvalidRequestError, ModelError
from hypergen.load_settings import environment_of, load_settings
from hypergen.model_info import ModelDefaults, ModelInfo
from hypergen.model_store.lora_files import name_of, open_registry, summarise


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
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LoRA folder with a file outside and everything that tries to reach it."""
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


def test_names_come_from_flags_folders_and_the_model(place: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    _file(model / "loras" / "Pixel_Art.safetensors")
    other = _file(tmp_path / "other" / "a=b.safetensors")
    settings = _settings(lora=[f"Logo={other}", str(tmp_path / "secret.safetensors")], lora_dir=[place])
    registry = open_registry(settings, model)
    assert registry.default == "secret"
    assert registry.files["Logo"] == other
    names = {"Logo", "secret", "ink", "styles/oil paint", "Pixel_Art", "inside"}
    assert names <= registry.files.keys()
    assert not {"link", "pipe", "socket", "folder", "loop", "pickle"} & registry.files.keys()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lora": ["{0}/nothing.safetensors"]}, "no such .safetensors file"),
        ({"lora": ["x={0}/pickle.bin"]}, "no such .safetensors file"),
        ({"lora_dir": ["{0}/nothing"]}, "no such folder"),
        ({"lora": ["a\nb={0}/ink.safetensors"]}, "is not a valid LoRA name"),
        ({"lora": ["={0}/ink.safetensors"]}, "is not a valid LoRA name"),
        ({"lora": ["{0}/ink.safetensors", "{0}/inside.safetensors"]}, "Only one"),
        (
            {"lora": ["ink={0}/styles/oil paint.safetensors"], "lora_dir": ["{0}"]},
            "Two LoRAs have the name ink",
        ),
        ({"lora_dir": ["{0}:{0}"]}, "must not contain ':'"),
    ],
)
def test_settings_that_cannot_be_are_told_at_the_start(
    place: Path, given: dict[str, list[str]], words: str
) -> None:
    filled = {name: tuple(item.format(place) for item in items) for name, items in given.items()}
    with pytest.raises(ConfigurationError, match=words):
        open_registry(_settings(**filled), None)


def test_lists_come_from_the_environment_and_from_yaml(tmp_path: Path) -> None:
    flags = {"lora": ("a=/x/a.safetensors", "/y/b c.safetensors"), "lora_dir": (Path("/l"), Path("/m"))}
    environment = environment_of(flags)
    assert environment["HYPERGEN_LORA"] == "a=/x/a.safetensors:/y/b c.safetensors"
    file = tmp_path / "settings.yaml"
    file.write_text("engine: {lora: ['a=/x/a.safetensors', '/y/b c.safetensors'], lora_dir: [/l, /m]}")
    for settings in (load_settings(environment=environment), load_settings(file)):
        assert settings.engine.lora == flags["lora"]
        assert settings.engine.lora_dir == flags["lora_dir"]
    assert load_settings(file, flags={"lora": ()}).engine.lora == flags["lora"]


def _description(place: Path, **changes: Any) -> ModelInfo:
    registry = open_registry(_settings(lora_dir=[place]), None)
    offer: dict[str, Any] = {"loras": tuple(registry.files), "lora_folders": (str(place),), "max_loras": 2}
    return ModelInfo(
        id="small",
        family="sd",
        defaults=ModelDefaults(4, 5.0, 64, 64),
        samplers={},
        min_steps=1,
        device="cpu",
        dtype="float32",
        **{**offer, **changes},
    )


def _loras(description: ModelInfo, **fields: Any) -> tuple[tuple[str, float], ...]:
    asked = openai_images.to_request(
        {"prompt": "a", **fields}, description, Settings.model_validate({}).server, "1"
    )
    return asked.generation.loras


def test_a_request_gives_a_name_or_a_path(place: Path) -> None:
    description = _description(place)
    assert _loras(description) == ()
    assert _loras(description, lora_path="ink") == (("ink", 1.0),)
    assert _loras(description, lora_path=str(place / "ink.safetensors"), lora_scale=2) == (("ink", 2.0),)
    assert _loras(description, lora_path="styles/oil paint.safetensors") == (("styles/oil paint", 1.0),)
    assert _loras(description, loras={"styles/oil paint": 0.5, "ink": 1}) == (
        ("ink", 1.0),
        ("styles/oil paint", 0.5),
    )
    assert _loras(description, lora_path="ink", lora_scale=0) == ()
    assert _loras(description, loras={}) == ()
    _file(place / "later.safetensors")
    assert _loras(description, lora_path=str(place / "later.safetensors")) == (("later", 1.0),)
    registry = open_registry(_settings(lora_dir=[place]), None)
    assert registry.path_of("later") == place / "later.safetensors"


def test_the_servers_default_is_for_requests_that_name_none(place: Path) -> None:
    description = _description(place, default_lora="ink")
    assert _loras(description) == (("ink", 1.0),)
    assert _loras(description, lora_scale=0.5) == (("ink", 0.5),)
    assert _loras(description, lora_scale=0) == ()
    assert _loras(description, lora_path="styles/oil paint") == (("styles/oil paint", 1.0),)
    assert _loras(description, loras={}) == ()


def test_whatever_is_not_offered_gets_one_answer(place: Path) -> None:
    description = _description(place)
    outside = place.parent / "secret.safetensors"
    tries = [
        "",
        "nothing",
        "nothing.safetensors",
        "ink.safetensors\0",
        "../secret.safetensors",
        f"{place}/../secret.safetensors",
        f"{place}/../loras/ink.safetensors",
        str(outside),
        str(place.parent / "nothing.safetensors"),
        f"{place}/up/secret.safetensors",
        f"file://{place}/ink.safetensors",
        "https://host/ink.safetensors",
        "~/ink.safetensors",
        "$HOME/ink.safetensors",
        "\uff0e\uff0e/secret.safetensors",
        "a" * 5000 + ".safetensors",
        *[f"{place}/{name}.safetensors" for name in ("link", "loop", "zero", "pipe", "socket", "folder")],
        f"{place}/pickle.bin",
        "/dev/zero",
        "/proc/self/environ",
    ]
    for field, answers in (("lora_path", set[str]()), ("loras", set[str]())):
        for text in tries:
            with pytest.raises(InvalidRequestError) as refused:
                _loras(description, **{field: text if field == "lora_path" else {text: 1.0}})
            assert refused.value.param == field
            answers.add(refused.value.message)
        assert len(answers) == 1


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
def test_bad_weights_and_too_many_are_refused(place: Path, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        _loras(_description(place), **fields)
    assert refused.value.param == param


def test_names_that_the_engine_does_not_know_are_refused_there_too(place: Path) -> None:
    registry = open_registry(_settings(lora_dir=[place]), None)
    for name in ("nothing", "../secret", "link", "up/secret", "a\0b", "pipe"):
        with pytest.raises(InvalidRequestError):
            registry.path_of(name)
    assert name_of("/dev/null", (), ()) is None


@pytest.mark.parametrize(
    ("shapes", "model", "layout", "ranks"),
    [
        ({"unet.d.attn2.to_k.lora_A.weight": [8, 768]}, "sd 1.x", "diffusers", (8,)),
        ({"unet.d.attn2.processor.to_k_lora.down.weight": [4, 1024]}, "sd 2.x", "diffusers", (4,)),
        (
            {
                "lora_unet_d_attn2_to_k.lora_down.weight": [16, 2048],
                "lora_te1_x.lora_down.weight": [8, 768],
                "lora_te1_x.alpha": [],
            },
            "sdxl",
            "kohya",
            (8, 16),
        ),
        (
            {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": [4, 3072]},
            "flux",
            "diffusers",
            (4,),
        ),
        ({"lora_unet_double_blocks_0_x.lora_down.weight": [4, 9]}, "flux", "kohya", (4,)),
    ],
)
def test_a_header_tells_what_a_file_is_for(
    tmp_path: Path, shapes: dict[str, list[int]], model: str, layout: str, ranks: tuple[int, ...]
) -> None:
    found = summarise(_file(tmp_path / "a.safetensors", shapes))
    assert (found.model, found.layout, found.ranks) == (model, layout, ranks)
    with pytest.raises(ModelError, match="has no LoRA layers"):
        summarise(_file(tmp_path / "b.safetensors", {"unet.conv_in.weight": [1]}))
