"""Weights are loaded straight to a CUDA device, with the bits that they have on the CPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models import modeling_utils

from hypergen.model_store.diffusers_layout import CHECKPOINT
from hypergen.models import loading
from hypergen.served_model_config import ModelOptions
from tests.support.checkpoint_layouts import LAYOUTS
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.random_models import SMALL_VAE
from tests.support.small_models import save_flux, save_refiner, save_sd, save_sd3, save_sdxl
from tests.support.sync_engine import make_settings

_SAVE = {"sd": save_sd, "sdxl": save_sdxl, "flux": save_flux, "sd3": save_sd3}


def _moved_bytes(device: FakeCuda) -> int:
    """Bytes of weights that were complete on the CPU before they went to the device."""
    files = ("hypergen/models/memory.py", "hypergen/models/refiner.py", "hypergen/conditioning/controlnet.py")
    return sum(size for entry, size in device.copied_bytes.items() if any(file in entry for file in files))


def _assert_equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert tensor.is_cuda, name
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.cpu(), expected[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", _SAVE)
def test_weights_go_straight_to_the_device(tmp_path: Path, family: str, dtype: str) -> None:
    folder = _SAVE[family](tmp_path / "model")
    settings = {"dtype": dtype}
    if family == "sdxl":
        settings["refiner"] = str(save_refiner(tmp_path / "refiner", folder))
    on_cpu = loading.load(folder, make_settings(**settings))
    with fake_cuda() as device:
        direct = loading.load(folder, make_settings(device="cuda", **settings))
        assert not _moved_bytes(device)
        for ours, theirs in zip(direct.modules, on_cpu.modules, strict=True):
            _assert_equal(ours, theirs)
            assert not ours.training
            assert not hasattr(ours, "_hf_hook")  # which would copy inputs in each forward pass


@pytest.mark.parametrize("layout", ["SD 1.5", "SDXL", "SDXL fp8_scaled", "FLUX fp8_scaled"])
def test_a_single_file_goes_straight_to_the_device(tmp_path: Path, layout: str) -> None:
    file, configuration, _ = LAYOUTS[layout].build(tmp_path)
    shutil.copy(file, configuration / CHECKPOINT)
    _assert_loaded_straight(configuration, ModelOptions())


@pytest.mark.parametrize("form", ["folder", "file"])
def test_another_vae_goes_straight_to_the_device(sd_folder: Path, tmp_path: Path, form: str) -> None:
    vae: Any = AutoencoderKL(**SMALL_VAE)
    vae.save_pretrained(tmp_path / "vae")
    source = tmp_path / "vae" if form == "folder" else next((tmp_path / "vae").glob("*.safetensors"))
    _assert_loaded_straight(sd_folder, ModelOptions(vae=str(source)))


def _assert_loaded_straight(folder: Path, options: ModelOptions) -> None:
    on_cpu: Any = loading.load_any(folder, make_settings(dtype="bfloat16"), options=options)
    with fake_cuda() as device:
        settings = make_settings(device="cuda", dtype="bfloat16")
        direct: Any = loading.load_any(folder, settings, options=options)
        assert not _moved_bytes(device)
        for ours, theirs in zip(direct.modules, on_cpu.modules, strict=True):
            _assert_equal(ours, theirs)
            assert not hasattr(ours, "_hf_hook")


def test_shards_are_loaded_in_parallel_with_the_same_bits(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    unet.save_pretrained(tmp_path / "unet", max_shard_size="100KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 4
    monkeypatch.setattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING", True)
    with fake_cuda():
        loaded = UNet2DConditionModel.from_pretrained(tmp_path / "unet", device_map="cuda")
        _assert_equal(loaded, unet)
