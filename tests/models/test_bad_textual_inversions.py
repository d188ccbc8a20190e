"""Textual inversions that are refused, with what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from hypergen.config import EngineSettings
from hypergen.errors import InvalidRequestError, SettingError
from hypergen.model_store.components import find_embeddings
from hypergen.models import loading
from tests.support.lora_files import save_lora
from tests.support.small_models import save_flux, save_sdxl
from tests.support.sync_engine import make_settings

_WIDTH = 32  # of the small SD's text encoder


def _vectors(count: int, width: int = _WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 0.05


_NAN = torch.full((1, _WIDTH), torch.nan)
_REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "another width": ({"emb_params": _vectors(1, 40)}, "has vectors of width 40, not 32"),
    "SDXL's": ({"clip_l": _vectors(1), "clip_g": _vectors(1)}, "this one has no text encoder for 'clip_g'"),
    "only SDXL's second": ({"clip_g": _vectors(1)}, "this one has no text encoder for 'clip_g'"),
    "an output embedding": ({"emb_params": _vectors(1), "emb_params_out": _vectors(1)}, "'emb_params_out'"),
    "an output embedding alone": ({"clip_l_out": _vectors(1)}, "'clip_l_out'"),
    "two tensors": ({"a": _vectors(1), "b": _vectors(1)}, "'a' is no tensor of a textual inversion"),
    "an image": ({"a": torch.ones(1, 2, 32)}, r"has the shape \[1, 2, 32\]"),
    "too many vectors": ({"a": torch.ones(76, 32)}, "not 1 to 75 vectors"),
    "no vector": ({"a": torch.ones(0, 32)}, "not 1 to 75 vectors"),
    "integers": ({"a": torch.ones(1, 32, dtype=torch.int32)}, "'emb_params' has the shape"),
    "not a number": ({"a": _NAN}, "NaN or Inf"),
}


@pytest.mark.parametrize(("state", "message"), _REFUSED.values(), ids=_REFUSED.keys())
def test_a_file_that_does_not_fit_is_a_start_error(
    sd_folder: Path, tmp_path: Path, state: dict[str, Tensor], message: str
) -> None:
    file = tmp_path / "style.safetensors"
    save_file(state, file)
    with pytest.raises(SettingError, match=message) as refused:
        loading.load(sd_folder, make_settings(embedding={"style": str(file)}))
    assert str(refused.value).startswith("embedding 'style' ")
    assert "\n" not in str(refused.value)


def test_metadata_of_another_model_are_a_start_error(sd_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    save_file({"emb_params": _vectors(1)}, file, {"modelspec.architecture": "flux-1-dev/textual-inversion"})
    with pytest.raises(SettingError, match=r"modelspec\.architecture is 'flux-1-dev"):
        loading.load(sd_folder, make_settings(embedding={"style": str(file)}))


class _Code:
    pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"string_to_param": torch.nn.ParameterDict({"a": _vectors(1)})}, "is a pickle that has more than"),
        ({"string_to_param": {"*": _vectors(1)}, "hook": _Code()}, "is a pickle that has more than tensors"),
        ({"string_to_param": {"*": _vectors(1)}, "extra": 5}, "'extra' is no tensor"),
        ({"string_to_param": {"*": _vectors(1), "b": _vectors(1)}}, "'string_to_param' is no tensor"),
        ([1, 2], "is for another model: it has nothing for the text_encoder"),
    ],
)
def test_a_pickle_that_is_not_wholly_understood_is_a_start_error(
    sd_folder: Path, tmp_path: Path, content: Any, message: str
) -> None:
    torch.save(content, tmp_path / "style.pt")
    with pytest.raises(SettingError, match=message):
        loading.load(sd_folder, make_settings(embedding={"style": str(tmp_path / "style.pt")}))


def test_a_damaged_file_is_a_start_error(sd_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    file.write_bytes(b"\0" * 100)
    with pytest.raises(SettingError, match="'style' is damaged"):
        loading.load(sd_folder, make_settings(embedding={"style": str(file)}))


def test_sdxl_needs_vectors_for_both_encoders(tmp_path: Path) -> None:
    folder = save_sdxl(tmp_path / "model")
    file = tmp_path / "style.safetensors"
    cases = {
        "it has nothing for the text_encoder_2": {"emb_params": _vectors(1)},
        "has different numbers of vectors": {"clip_l": _vectors(1), "clip_g": _vectors(2, 48)},
    }
    for message, state in cases.items():
        save_file(state, file)
        with pytest.raises(SettingError, match=message):
            loading.load(folder, make_settings(embedding={"style": str(file)}))


def test_a_bundled_embedding_that_does_not_fit_is_an_error(sd_folder: Path, tmp_path: Path) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    lora = save_lora(tmp_path / "ink.safetensors", pipeline)
    save_file({**load_file(lora), "bundle_emb.style.clip_l": _vectors(1, 40)}, lora)
    family: Any = loading.load(sd_folder, make_settings(lora_dir=[str(tmp_path)]))
    with pytest.raises(
        InvalidRequestError, match="has an embedding 'style' that is for another model"
    ) as refused:
        family.lora_manager.load((("ink", 1.0),))
    assert refused.value.param == "loras"


def test_other_families_refuse_the_setting(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    save_file({"emb_params": _vectors(1)}, file)
    with pytest.raises(SettingError, match="embedding is only supported for sd, sdxl models"):
        loading.load(save_flux(tmp_path / "model"), make_settings(embedding={"style": str(file)}))


def test_missing_files_and_equal_names_are_found_before_the_engine_starts(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    save_file({"emb_params": _vectors(1)}, file)
    settings = EngineSettings.model_validate({"embedding": [f"style={file}"]})
    assert find_embeddings(settings.embedding) == {"style": str(file)}
    with pytest.raises(SettingError, match=r"'b': no such \.safetensors or \.pt or \.bin file"):
        find_embeddings({"b": str(tmp_path / "missing.safetensors")})
    with pytest.raises(SettingError, match="has the name 'Style' twice"):
        find_embeddings({"style": str(file), "Style": str(file)})
