"""`clip_skip` of requests and of served-model files, against diffusers.

diffusers counts the layers that it skips, before the one that a model takes. So its `clip_skip=1` is 2 here
for Stable Diffusion, and 3 for SDXL. It skips no layers of a negative prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTextModel

from hypergen.errors import InvalidRequestError
from hypergen.models import loading
from hypergen.served_model_config import ModelOptions
from tests.support.compare_with_diffusers import assert_same, common_arguments, pixels_of
from tests.support.model_folders import error_message
from tests.support.small_models import save_flux, save_sd3, save_sdxl
from tests.support.sync_engine import InlineEngine, generate_alone, make_request, make_settings

_NEGATIVE = "a blurred dog"
_UNGUIDED = make_request(num_inference_steps=3, guidance_scale=1.0)
_GUIDED = make_request(num_inference_steps=3, guidance_scale=4.0, negative_prompt=_NEGATIVE)
# Layers that are not skipped: SD takes the last one, SDXL the next to last. The small models have few.
_TAKEN = {"sd": 1, "sdxl": 2}
_CASES = [("sd", 1), ("sd", 2), ("sdxl", 2), ("sdxl", 3)]


@pytest.fixture(scope="module")
def folders(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"sd": sd_folder, "sdxl": save_sdxl(tmp_path_factory.mktemp("models") / "sdxl")}


@pytest.fixture(scope="module")
def families(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: _load(folder) for name, folder in folders.items()}


def _load(folder: Path, **options: Any) -> Any:
    return loading.load_any(folder, make_settings(), None, ModelOptions.model_validate(options))


def _stock(folder: Path) -> Any:
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def _text_model() -> Iterator[None]:
    """diffusers' SD pipeline expects the attribute of transformers before 5.6, to skip layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)
        yield


@pytest.mark.parametrize(("name", "clip_skip"), _CASES)
def test_a_request_skips_layers_as_diffusers_does(
    name: str, clip_skip: int, folders: dict[str, Path], families: dict[str, Any]
) -> None:
    request = replace(_UNGUIDED, clip_skip=clip_skip)
    skipped = clip_skip - _TAKEN[name]
    pipeline = _stock(folders[name])
    with _text_model():
        images = pipeline(request.prompt, clip_skip=skipped or None, **common_arguments(request)).images
    assert_same(generate_alone(families[name], request), np.asarray(images[0]))


@pytest.mark.parametrize(("name", "clip_skip"), _CASES)
def test_layers_of_the_negative_prompt_are_skipped_too(
    name: str, clip_skip: int, folders: dict[str, Path], families: dict[str, Any]
) -> None:
    pipeline = _stock(folders[name])
    skipped = clip_skip - _TAKEN[name]
    embeds: dict[str, torch.Tensor] = {}
    for prefix, text in (("", _GUIDED.prompt), ("negative_", _NEGATIVE)):
        with _text_model():
            outputs = pipeline.encode_prompt(
                text,
                device="cpu",
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
                clip_skip=skipped or None,
            )
        embeds[f"{prefix}prompt_embeds"] = outputs[0]
        if name == "sdxl":
            embeds[f"{prefix}pooled_prompt_embeds"] = outputs[2]
    image = np.asarray(pipeline(**embeds, **common_arguments(_GUIDED)).images[0])
    assert_same(generate_alone(families[name], replace(_GUIDED, clip_skip=clip_skip)), image)
    # An option of a served-model file is the default of requests.
    family = _load(folders[name], clip_skip=clip_skip)
    assert_same(generate_alone(family, _GUIDED), image)
    own = replace(_GUIDED, clip_skip=_TAKEN[name])
    assert (generate_alone(family, own) == generate_alone(families[name], _GUIDED)).all()


@pytest.mark.parametrize("name", _TAKEN)
def test_cached_embeddings_of_other_layers_are_not_used(name: str, families: dict[str, Any]) -> None:
    """Also with a longer negative prompt, so that the prompt is padded with empty chunks."""
    long = replace(_GUIDED, negative_prompt="a blurred dog " * 40)
    requests = [replace(long, id=str(skip), clip_skip=skip) for skip in (1, 2, None)]
    family = families[name]
    batched = InlineEngine(family)
    batched.run(*requests)
    images = [pixels_of(batched.data(request)) for request in requests]
    assert (images[0] != images[1]).any()
    default = images[_TAKEN[name] - 1]
    assert (images[2] == default).all()
    for request, image in zip(reversed(requests), reversed(images), strict=True):
        assert (generate_alone(family, request) == image).all()


def test_it_is_limited_by_the_layers_of_the_text_encoder(
    folders: dict[str, Path], families: dict[str, Any]
) -> None:
    assert "clip_skip must be at most 2" in error_message(_load, folders["sd"], clip_skip=3)
    engine = InlineEngine(families["sd"])
    engine.run(request := replace(_UNGUIDED, clip_skip=3))
    error = engine.errors[request.id]
    assert isinstance(error, InvalidRequestError)
    assert error.param == "clip_skip"
    assert "'clip_skip' must be at most 2" in error.message


@pytest.mark.parametrize("save", [save_flux, save_sd3])
def test_other_families_do_not_have_it(save: Any, tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    assert "clip_skip does not apply to models of " in error_message(_load, folder, clip_skip=2)
    assert "clip_skip" not in _load(folder).model_info("model").capabilities
