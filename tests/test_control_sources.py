"""ControlNet folders are checked before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import ControlNetModel

from hypergen.errors import SettingError
from hypergen.model_store.components import find_controlnets


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("control") / "edges"
    model = ControlNetModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), norm_num_groups=4, cross_attention_dim=8
    )
    model.save_pretrained(folder)
    return folder


def test_folders_become_absolute_paths_and_hub_ids_are_unchanged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    found = find_controlnets({"edges": "./edges", "depth": "owner/depth"})
    assert found == {"edges": str(folder.resolve()), "depth": "owner/depth"}


def test_the_error_names_a_missing_or_damaged_folder(folder: Path) -> None:
    with pytest.raises(SettingError, match=r"controlnet 'edges': no such folder: ./nowhere"):
        find_controlnets({"edges": "./nowhere"})
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(SettingError, match=r"edges/diffusion_pytorch_model.safetensors is damaged"):
        find_controlnets({"edges": str(folder)})
