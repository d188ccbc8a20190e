"""Single-file checkpoints: their components, the source of their configuration, and their images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from hypergen.model_store import store
from hypergen.models import loading
from hypergen.request import GenerationRequest
from tests.support.model_folders import error_message
from tests.support.original_layout import save_original, save_original_sd3
from tests.support.small_models import save_flux, save_sd3, save_sdxl
from tests.support.sync_engine import generate_alone, make_request, make_settings

_REQUEST = make_request(num_inference_steps=2, negative_prompt="blurred", guidance_scale=4.0)


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("models") / "small-sdxl")


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("models") / "small-sd3")


def _original(folder: Path, file: Path) -> Path:
    return save_original(DiffusionPipeline.from_pretrained(folder), file)


def _configuration(folder: Path, target: Path) -> Path:
    """A copy of the folder without weights."""
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors")))


def _denoiser(folder: Path, name: str, file: Path) -> Path:
    """A file with only the denoiser, with diffusers' tensor names."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    save_file(getattr(pipeline, name).state_dict(), file)
    return file


def _generate(path: Path, request: GenerationRequest = _REQUEST) -> np.ndarray:
    return generate_alone(loading.load(path, make_settings()), request)


def test_a_checkpoint_generates_the_same_image_as_its_folder(sd_folder: Path, tmp_path: Path) -> None:
    file = _original(sd_folder, tmp_path / "My Model.safetensors")
    configuration = _configuration(sd_folder, tmp_path / "configuration")
    stored = store.get_or_import(str(file), single_file_config=str(configuration))
    assert stored.tag.startswith("my-model:")
    assert stored.source == str(file)
    assert (_generate(stored.path) == _generate(sd_folder)).all()
    assert store.get_or_import(stored.tag).path == stored.path
    assert store.find_by_tag("my-model").path == stored.path


def test_an_sd2_checkpoint_generates_the_same_image_as_its_folder(
    v_prediction_folder: Path, tmp_path: Path
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(v_prediction_folder)
    file = save_original(pipeline, tmp_path / "v2.safetensors", second_version=True)
    configuration = _configuration(v_prediction_folder, tmp_path / "configuration")
    stored = store.get_or_import(str(file), single_file_config=str(configuration))
    assert (_generate(stored.path) == _generate(v_prediction_folder)).all()


def test_an_sdxl_checkpoint_generates_the_same_image_as_its_folder(sdxl_folder: Path, tmp_path: Path) -> None:
    file = _original(sdxl_folder, tmp_path / "model.safetensors")
    configuration = _configuration(sdxl_folder, tmp_path / "configuration")
    stored = store.get_or_import(str(file), single_file_config=str(configuration))
    assert (_generate(stored.path) == _generate(sdxl_folder)).all()


def test_an_sd3_checkpoint_generates_the_same_image_as_its_folder(sd3_folder: Path, tmp_path: Path) -> None:
    file = save_original_sd3(DiffusionPipeline.from_pretrained(sd3_folder), tmp_path / "sd3.safetensors")
    rest = Path(shutil.copytree(sd3_folder, tmp_path / "rest"))
    for part in ("transformer", "vae"):
        next((rest / part).glob("*.safetensors")).unlink()
    stored = store.get_or_import(str(file), single_file_config=str(rest))
    assert (_generate(stored.path) == _generate(sd3_folder)).all()


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_a_denoiser_with_diffusers_names_is_completed_from_its_configuration(
    family: str, sdxl_folder: Path, tmp_path: Path
) -> None:
    folder = sdxl_folder if family == "sdxl" else save_flux(tmp_path / "small-flux")
    name = "unet" if family == "sdxl" else "transformer"
    file = _denoiser(folder, name, tmp_path / "denoiser.safetensors")
    rest = Path(shutil.copytree(folder, tmp_path / "rest"))
    next((rest / name).glob("*.safetensors")).unlink()
    stored = store.get_or_import(str(file), single_file_config=str(rest))
    assert (_generate(stored.path) == _generate(folder)).all()


def test_sd3_runs_without_t5_if_neither_file_nor_folder_has_it(sd3_folder: Path, tmp_path: Path) -> None:
    file = _denoiser(sd3_folder, "transformer", tmp_path / "sd3.safetensors")
    without = Path(shutil.copytree(sd3_folder, tmp_path / "without"))
    next((without / "text_encoder_3").glob("*.safetensors")).unlink()
    stored = store.get_or_import(str(file), single_file_config=str(without))
    index = json.loads((without / "model_index.json").read_text())
    (without / "model_index.json").write_text(
        json.dumps(index | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]})
    )
    assert (_generate(stored.path) == _generate(without)).all()


def test_the_configuration_is_found_next_to_the_file_and_in_the_store(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = Path(shutil.copytree(sd_folder, tmp_path / "repository"))
    file = _original(sd_folder, repository / "v1.safetensors")
    monkeypatch.chdir(repository)
    assert store.get_or_import("v1.safetensors").source == "v1.safetensors"
    copied = Path(shutil.copy(file, tmp_path / "copied.safetensors"))
    usual = tmp_path / "stable-diffusion-v1-5/stable-diffusion-v1-5"
    shutil.copytree(sd_folder, usual)
    monkeypatch.chdir(tmp_path)
    store.get_or_import("stable-diffusion-v1-5/stable-diffusion-v1-5")
    shutil.rmtree(usual)
    assert (_generate(store.get_or_import(str(copied)).path) == _generate(sd_folder)).all()


def test_the_configuration_is_found_in_the_cache_of_the_hub(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    model = cache / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text("0" * 40)
    _configuration(sd_folder, model / "snapshots" / ("0" * 40))
    file = _original(sd_folder, tmp_path / "model.safetensors")
    assert (_generate(store.get_or_import(str(file)).path) == _generate(sd_folder)).all()


def test_the_error_for_a_missing_configuration_says_how_to_give_one(sd_folder: Path, tmp_path: Path) -> None:
    file = _original(sd_folder, tmp_path / "model.safetensors")
    text = error_message(store.get_or_import, str(file))
    assert "--single-file-config" in text
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in text
    assert "HF_HUB_OFFLINE" in text
    assert "no such folder" in error_message(store.get_or_import, str(file), single_file_config="none at all")
    (tmp_path / "empty").mkdir()
    assert "model_index.json is missing" in error_message(
        store.get_or_import, str(file), single_file_config=str(tmp_path / "empty")
    )


def test_a_configuration_of_another_model_is_refused(
    sd_folder: Path, sdxl_folder: Path, sd3_folder: Path, tmp_path: Path
) -> None:
    file = _original(sd_folder, tmp_path / "model.safetensors")
    text = error_message(store.get_or_import, str(file), single_file_config=str(sdxl_folder))
    assert "is a checkpoint of a StableDiffusionPipeline" in text
    assert "StableDiffusionXLPipeline" in text
    transformer = _denoiser(sd3_folder, "transformer", tmp_path / "sd3.safetensors")
    bare = _configuration(sd3_folder, tmp_path / "bare")
    text = error_message(store.get_or_import, str(transformer), single_file_config=str(bare))
    assert "has weights for text_encoder, text_encoder_2, vae" in text
    assert "is only for single-file checkpoints" in error_message(
        store.get_or_import, str(sd_folder), single_file_config=str(sd_folder)
    )


def test_files_that_are_not_checkpoints_are_refused(sd_folder: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "none.safetensors")
    assert error_message(store.get_or_import, missing) == f"No such file: {missing}"
    assert (
        error_message(store.get_or_import, "models/none.safetensors")
        == "No such file: models/none.safetensors"
    )
    truncated = _original(sd_folder, tmp_path / "model.safetensors")
    truncated.write_bytes(truncated.read_bytes()[:-10])
    assert "model.safetensors is damaged" in error_message(store.get_or_import, str(truncated))
    for name, tensor, reason in (
        ("lora", "unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "is a LoRA"),
        ("control", "controlnet_cond_embedding.conv_in.weight", "is a ControlNet"),
        ("vae", "encoder.conv_in.weight", "has no denoiser"),
    ):
        file = tmp_path / f"{name}.safetensors"
        save_arrays({tensor: np.zeros((4, 4), np.float32)}, file)
        assert reason in error_message(store.get_or_import, str(file))
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"")
    assert "must be a folder or a .safetensors file" in error_message(store.get_or_import, str(pickle))


@pytest.mark.parametrize(
    "missing",
    [
        "model.diffusion_model.out.2.weight",
        "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
    ],
)
def test_a_file_with_missing_weights_is_refused(sd_folder: Path, tmp_path: Path, missing: str) -> None:
    weights = load_file(_original(sd_folder, tmp_path / "complete.safetensors"))
    save_file(
        {name: tensor for name, tensor in weights.items() if name != missing}, tmp_path / "model.safetensors"
    )
    stored = store.get_or_import(str(tmp_path / "model.safetensors"), single_file_config=str(sd_folder))
    message = error_message(loading.load, stored.path, make_settings())
    assert f"The tensor '{missing}'" in message
    assert "is missing" in message


def test_loras_in_the_configuration_folder_are_available(
    sd_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    configuration = _configuration(sd_folder, tmp_path / "configuration")
    (configuration / "loras").mkdir()
    shutil.copy(lora_folder / "style.safetensors", configuration / "loras")
    file = _original(sd_folder, tmp_path / "model.safetensors")
    stored = store.get_or_import(str(file), single_file_config=str(configuration))
    family = loading.load(stored.path, make_settings())
    assert family.model_info("model").loras == ("style",)
    lora_request = make_request(num_inference_steps=3, loras=(("style", 1.0),))
    assert (
        _generate(stored.path, lora_request) != _generate(stored.path, make_request(num_inference_steps=3))
    ).any()


def test_the_error_for_weights_of_another_shape_is_one_line(sd_folder: Path, tmp_path: Path) -> None:
    file = _original(sd_folder, tmp_path / "model.safetensors")
    other = _configuration(sd_folder, tmp_path / "other")
    config = json.loads((other / "unet/config.json").read_text())
    (other / "unet/config.json").write_text(json.dumps(config | {"cross_attention_dim": 64}))
    stored = store.get_or_import(str(file), single_file_config=str(other))
    text = error_message(loading.load, stored.path, make_settings())
    assert "attn2.to_k.weight' gives the unet a shape of" in text
    assert str(stored.path) not in text
