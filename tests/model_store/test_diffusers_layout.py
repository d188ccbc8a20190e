"""Checks of a model folder before it is served."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hypergen.model_store import store
from tests.support.model_folders import INDEX, WEIGHTS, error_message, make_model


def test_a_complete_folder_passes(folder: Path):
    store.check_folder(folder)


def test_truncated_weights_are_reported_with_both_sizes(folder: Path):
    weights = folder / "unet" / WEIGHTS
    size = weights.stat().st_size
    os.truncate(weights, size - 10)
    expected = f"unet/{WEIGHTS} is damaged: it should have {size} bytes and has {size - 10}."
    assert error_message(store.get_or_import, str(folder)) == f"{folder}: {expected}"


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 7, b"\xff" * 100, b"\x04" + b"\0" * 7 + b"[1]]", b"\x02" + b"\0" * 7 + b"[]"]
)
def test_damaged_headers_are_reported(folder: Path, content: bytes):
    (folder / "vae" / WEIGHTS).write_bytes(content)
    assert f"vae/{WEIGHTS} is damaged" in error_message(store.check_folder, folder)


def test_git_lfs_pointers_are_reported(folder: Path):
    (folder / "vae" / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in error_message(store.check_folder, folder)


def test_missing_components_are_reported(folder: Path):
    (folder / "vae/config.json").unlink()
    assert "vae/config.json is missing" in error_message(store.check_folder, folder)
    (folder / "vae" / WEIGHTS).rename(folder / "vae/diffusion_pytorch_model.bin")
    assert "vae has only pickle weights" in error_message(store.check_folder, folder)
    (folder / "vae/diffusion_pytorch_model.bin").unlink()
    assert "vae has no safetensors weights" in error_message(store.check_folder, folder)
    (folder / "vae").rmdir()
    assert "'vae', but there is no such folder" in error_message(store.check_folder, folder)
    (folder / "model_index.json").write_text("{")
    assert "model_index.json is damaged" in error_message(store.check_folder, folder)
    (folder / "model_index.json").unlink()
    assert "has no model_index.json" in error_message(store.check_folder, folder)


def test_missing_shards_are_reported(folder: Path):
    (folder / "unet" / WEIGHTS).rename(folder / "unet/model-00001-of-00002.safetensors")
    assert "without their safetensors.index.json" in error_message(store.check_folder, folder)
    index = folder / "unet" / f"{WEIGHTS}.index.json"
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": shards}))
    assert "names 'model-00002-of-00002.safetensors'" in error_message(store.check_folder, folder)
    index.write_text(json.dumps({"weight_map": {"b": f"../vae/{WEIGHTS}"}}))
    assert "its folder has no such file" in error_message(store.check_folder, folder)


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": ["pipeline", "Mine"]},
        {"unet": ["my_library", "UNet"]},
        {"unet": ["stable_diffusion", "UNet"]},
        {"../evil": ["diffusers", "UNet2DConditionModel"]},
        {"unet": ["diffusers"]},
        {"unet": ["diffusers", None]},
    ],
)
def test_a_pipeline_with_custom_code_is_refused(tmp_path: Path, change: dict[str, Any]):
    folder = make_model(tmp_path / "model", INDEX | change)
    assert str(folder) in error_message(store.check_folder, folder)


def test_a_deleted_safety_checker_is_not_an_error(tmp_path: Path):
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    folder = make_model(tmp_path / "model", INDEX | {"safety_checker": checker})
    store.check_folder(folder)
    assert store.get_or_import(str(folder)).tag
