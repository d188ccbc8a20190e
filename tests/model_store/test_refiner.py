"""The refiner in the settings: it is named and stored like a model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from diffusers import StableDiffusionXLImg2ImgPipeline

from hypergen.model_store import store
from hypergen.models import loading
from tests.support.model_folders import error_message, make_model
from tests.support.original_layout import save_original
from tests.support.small_models import save_refiner, save_sdxl
from tests.support.sync_engine import generate_alone, make_request, make_settings


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("models") / "small-sdxl")


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return save_refiner(tmp_path_factory.mktemp("models") / "small-refiner", base)


def test_a_refiner_is_found_by_folder_tag_and_file(
    base: Path, refiner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = Path(shutil.copytree(refiner, tmp_path / "owner/refiner"))
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner, text_encoder=None, tokenizer=None)
    file = save_original(pipeline, repository / "refiner.safetensors")
    monkeypatch.chdir(tmp_path)
    by_folder = store.get_or_import_refiner("owner/refiner")
    assert by_folder is not None
    by_tag, by_name = store.get_or_import_refiner(by_folder.tag), store.get_or_import_refiner("refiner")
    assert by_tag is not None
    assert by_name is not None
    assert by_tag.path == by_name.path == by_folder.path
    assert store.get_or_import_refiner(None) is None
    by_file = store.get_or_import_refiner(str(file))
    assert by_file is not None

    request = make_request(num_inference_steps=6, enable_refiner=True)
    families = [
        loading.load(base, make_settings(refiner=str(path)))
        for path in (refiner, by_folder.path, by_file.path)
    ]
    images = [generate_alone(family, request) for family in families]
    assert (images[0] == images[1]).all()
    assert (images[0] == images[2]).all()


def test_other_models_are_refused_as_refiner(base: Path, tmp_path: Path) -> None:
    assert "and is a StableDiffusionXLPipeline" in error_message(store.get_or_import_refiner, str(base))
    assert "is not a refiner" in error_message(store.get_or_import_refiner, str(make_model(tmp_path / "sd")))
    assert "No such folder" in error_message(store.get_or_import_refiner, str(tmp_path / "none"))
    assert "Unknown model" in error_message(store.get_or_import_refiner, "no-such-tag")
    assert "HF_HUB_OFFLINE" in error_message(store.get_or_import_refiner, "owner/refiner")
