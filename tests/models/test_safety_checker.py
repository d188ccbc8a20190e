"""The content filter: diffusers' network with random weights, and functions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig

from hypergen.errors import (
    ConfigurationError,
    ContentPolicyError,
    GenerationError,
    HyperGenError,
    SettingError,
)
from hypergen.model_store.safety_checkers import find_safety_checker
from hypergen.models import loading
from hypergen.models.safety_checker import load_safety_checker
from tests.support.sync_engine import InlineEngine, make_request, make_settings

_IMAGE = Image.new("RGB", (64, 48), "red")
_MODULE = "tests.support.content_filter"


def save_checker(folder: Path, threshold: float) -> Path:
    """A small network; at a threshold of -1 every image has every concept, above 1 none."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**vision, "image_size": 32, "patch_size": 16, "projection_dim": 8},
        text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        projection_dim=8,
    )
    network = StableDiffusionSafetyChecker(config)
    torch.nn.init.constant_(network.concept_embeds_weights, threshold)
    network.save_pretrained(folder)
    processor = {"crop_size": 32, "size": 32, "image_processor_type": "CLIPImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checker(tmp_path_factory.mktemp("checker") / "refusing", -1.1)


def test_the_network_refuses_by_its_thresholds(tmp_path: Path, refusing: Path) -> None:
    with pytest.raises(ContentPolicyError):
        load_safety_checker(str(refusing)).check(_IMAGE, "a cat")
    load_safety_checker(str(save_checker(tmp_path / "passing", 1.1))).check(_IMAGE, "a cat")


def test_the_network_may_be_a_part_of_a_model(tmp_path: Path, refusing: Path) -> None:
    shutil.copytree(refusing, tmp_path / "safety_checker")
    (tmp_path / "feature_extractor").mkdir()
    (tmp_path / "safety_checker/preprocessor_config.json").rename(
        tmp_path / "feature_extractor/preprocessor_config.json"
    )
    found = find_safety_checker(str(tmp_path))
    assert found == str(tmp_path)
    with pytest.raises(ContentPolicyError):
        load_safety_checker(found).check(_IMAGE, "a cat")


def test_a_function_gets_the_image_and_the_prompt() -> None:
    checker = load_safety_checker(f"{_MODULE}:refuse_marked")
    checker.check(_IMAGE, "a cat")
    with pytest.raises(ContentPolicyError):
        checker.check(_IMAGE, "a refused cat")


@pytest.mark.parametrize("name", ["say_nothing", "say_scores"])
def test_without_a_verdict_the_image_is_not_sent(name: str) -> None:
    with pytest.raises(GenerationError, match="one bool for each image"):
        load_safety_checker(f"{_MODULE}:{name}").check(_IMAGE, "a cat")


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("nosuch", SettingError, "nosuch: no such folder, hub id or module:function"),
        ("nosuch.module:check", ConfigurationError, "no module nosuch.module"),
        (f"{_MODULE}_x:check", ConfigurationError, f"no module {_MODULE}_x"),
    ],
)
def test_a_checker_that_does_not_exist_is_refused(given: str, error: type[HyperGenError], words: str) -> None:
    with pytest.raises(error, match=words):
        find_safety_checker(given)


@pytest.mark.parametrize("name", ["nosuch", "NOT_A_FUNCTION"])
def test_what_is_no_function_is_refused_by_the_engine(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot be loaded: (Attribute|Type)Error"):
        load_safety_checker(f"{_MODULE}:{name}")


def test_an_incomplete_folder_is_refused(tmp_path: Path, refusing: Path) -> None:
    with pytest.raises(SettingError, match=r"has no preprocessor_config.json"):
        find_safety_checker(str(tmp_path))
    shutil.copytree(refusing, tmp_path / "damaged")
    (tmp_path / "damaged/model.safetensors").write_bytes(b"x")
    with pytest.raises(SettingError, match=r"model.safetensors"):
        find_safety_checker(str(tmp_path / "damaged"))


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_every_tensor_of_the_network_is_accounted_for(tmp_path: Path, refusing: Path, change: str) -> None:
    folder = shutil.copytree(refusing, tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    weight = tensors.pop("visual_projection.weight")
    if change == "unexpected":
        tensors |= {"visual_projection.weight": weight, "surplus": weight.clone()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    name = "visual_projection.weight" if change == "missing" else "surplus"
    with pytest.raises(ConfigurationError, match=f"does not match its configuration: .*'{name}'"):
        load_safety_checker(str(folder))


def test_a_hub_id_is_only_looked_up_for_the_engine() -> None:
    assert find_safety_checker("owner/name", download=False) == "owner/name"


def test_the_engine_fails_the_refused_request_alone_and_has_no_previews(sd_folder: Path) -> None:
    engine = InlineEngine(loading.load(sd_folder, make_settings()), safety_checker=f"{_MODULE}:refuse_marked")
    changes: dict[str, Any] = {"num_inference_steps": 4, "partial_images": 2}
    good, bad, broken = (
        make_request(prompt=prompt, **changes) for prompt in ("a cat", "a refused cat", "a broken cat")
    )
    engine.run(good, bad, broken)
    assert list(engine.images) == [good.id]
    assert isinstance(engine.errors[bad.id], ContentPolicyError)
    assert type(engine.errors[broken.id]) is GenerationError
    assert "no verdict" not in engine.errors[broken.id].message
    assert not [event for _, event in engine.events if type(event).__name__ == "Preview"]


def test_the_engine_warms_up_with_a_filter_that_refuses_noise(sd_folder: Path, refusing: Path) -> None:
    engine = InlineEngine(loading.load(sd_folder, make_settings()), safety_checker=str(refusing))
    engine.engine.warm_up()
