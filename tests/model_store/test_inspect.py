"""`hypergen inspect` and the check at an import: what cannot be served is refused and does not stay."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from hypergen.cli.main import main
from hypergen.errors import ModelError
from hypergen.model_families import servable
from hypergen.model_store import store
from hypergen.model_store.diffusers_layout import PIPELINE_FILE
from hypergen.served_model_config import ModelOptions
from tests.support.checkpoint_layouts import LAYOUTS, REFUSED, with_fields
from tests.support.model_check import refuse_unusable
from tests.support.model_folders import error_message
from tests.support.small_models import save_refiner, save_sd, save_sdxl


def test_a_checkpoint_is_described_without_loading_it(tmp_path: Path) -> None:
    file, configuration, _ = LAYOUTS["SD 1.5 with tensors of its training"].build(tmp_path)
    result = CliRunner().invoke(main, ["inspect", str(file), "--single-file-config", str(configuration)])
    assert result.exit_code == 0, result.exception
    for text in ("sd (StableDiffusionPipeline)", "original", "unet", "F32", "not stated"):
        assert text in result.output
    assert "model_ema.decay: an average of the weights" in result.output
    assert "can be served:     yes" in result.output


def test_what_a_file_states_is_shown(tmp_path: Path) -> None:
    file, configuration, _ = LAYOUTS["SDXL v-prediction, by markers"].build(tmp_path)
    result = CliRunner().invoke(main, ["inspect", str(file), "--single-file-config", str(configuration)])
    assert "prediction type:   v_prediction" in result.output
    assert "zero terminal SNR: yes" in result.output


def test_a_file_that_cannot_be_served_ends_with_the_reason(tmp_path: Path) -> None:
    file = REFUSED["Chroma"].build(tmp_path / "chroma.safetensors")
    result = CliRunner().invoke(main, ["inspect", str(file)])
    assert isinstance(result.exception, ModelError)  # exit status 1, see `run`
    assert "checkpoint of Chroma" in str(result.exception)


def test_a_lora_is_described_by_its_own_names(tmp_path: Path) -> None:
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {
        f"{layer}.lora_down.weight": torch.zeros(4, 768),
        f"{layer}.lora_up.weight": torch.zeros(8, 4),
        f"{layer}.alpha": torch.ones(()),
    }
    file = tmp_path / "style.safetensors"
    save_file(tensors, file, {"ss_base_model_version": "sd_v1"})
    result = CliRunner().invoke(main, ["inspect", str(file)])
    assert result.exit_code == 0, result.exception
    rows = dict(line.split(":", 1) for line in result.output.splitlines())
    expected = {"family": "sd 1.x", "layout": "kohya (LoRA)", "layers": "1", "ranks": "4"}
    assert expected.items() <= {name: value.strip() for name, value in rows.items()}.items()
    assert "sd_v1 (ss_base_model_version)" in rows["base model"]
    assert rows["tensors"].strip() == "1 alpha, 1 lora_down.weight, 1 lora_up.weight"
    factors = {f"{layer}.hada_{name}": torch.zeros(4, 4) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    save_file(factors, file)
    result = CliRunner().invoke(main, ["inspect", str(file)])
    assert "kohya (LoHa)" in result.output


def test_tensors_that_change_nothing_are_summarized(tmp_path: Path) -> None:
    file, configuration, _ = LAYOUTS["SD 1.5"].build(tmp_path)
    averages = {f"model_ema.{n}": torch.zeros(1) for n in range(3)}
    save_file({**load_file(file), **averages}, file)
    result = CliRunner().invoke(main, ["inspect", str(file), "--single-file-config", str(configuration)])
    assert "ignored:           model_ema.0 and 2 more: an average of the weights" in result.output


def test_a_file_without_its_configuration_is_described_without_a_download(tmp_path: Path) -> None:
    file, _, _ = LAYOUTS["SD 1.5"].build(tmp_path)
    result = CliRunner().invoke(main, ["inspect", str(file)])
    assert result.exit_code == 0, result.exception
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5, which is not on this machine" in result.output
    result = CliRunner().invoke(main, ["inspect", str(file), "--single-file-config", "no/such"])
    assert "single_file_config no/such is not on this machine" in str(result.exception)


def test_a_folder_is_checked(tmp_path: Path) -> None:
    folder = LAYOUTS["SDXL"].save(tmp_path / "model")
    assert "can be served:     yes" in CliRunner().invoke(main, ["inspect", str(folder)]).output
    file = next((folder / "vae").glob("*.safetensors"))
    save_file({**load_file(file), "surplus": load_file(file)["decoder.conv_in.bias"]}, file)
    result = CliRunner().invoke(main, ["inspect", str(folder)])
    assert isinstance(result.exception, ModelError)
    assert "'surplus'" in str(result.exception)


def test_a_folder_of_a_pipeline_that_needs_an_image_is_refused_and_does_not_stay(tmp_path: Path) -> None:
    save = with_fields(save_sd, PIPELINE_FILE, _class_name="StableDiffusionInstructPix2PixPipeline")
    folder = str(save(tmp_path / "model"))
    for arguments in (["inspect", folder], ["import", folder]):
        assert "needs 'image'" in str(CliRunner().invoke(main, arguments).exception)
    assert "needs 'image'" in error_message(store.get_or_import, folder, pipelines=servable())
    assert not store.list_models()


@pytest.mark.parametrize("break_folder", ["channels", "vocabulary", "scheduler", "quantization", "option"])
def test_a_folder_that_fails_to_load_does_not_stay(break_folder: str, tmp_path: Path) -> None:
    folder, options, reason = tmp_path / "model", ModelOptions(), ""
    if break_folder == "channels":
        save_sdxl(folder, in_channels=8)
        reason = "8 input channels ('conv_in.weight')"
    elif break_folder == "vocabulary":
        for file in (save_sd(folder) / "tokenizer").iterdir():
            file.write_text("{") if file.suffix == ".json" else file.unlink()
        reason = "tokenizer"
    elif break_folder == "scheduler":
        with_fields(save_sd, PIPELINE_FILE, scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])(
            folder
        )
        reason = "cannot use the scheduler FlowMatchEulerDiscreteScheduler"
    elif break_folder == "quantization":
        stated = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        with_fields(save_sd, "unet/config.json", quantization_config=stated)(folder)
        reason = "unet/config.json has quantization_config (bitsandbytes)"
    else:
        save_sd(folder)
        options = ModelOptions(zero_terminal_snr=True)
        reason = "zero_terminal_snr needs prediction_type v_prediction"
    check = partial(refuse_unusable, options=options)
    assert reason in error_message(store.get_or_import, str(folder), check_files=check)
    assert not store.list_models()


def test_a_damaged_refiner_does_not_stay(tmp_path: Path) -> None:
    refiner = save_refiner(tmp_path / "refiner", save_sdxl(tmp_path / "base"))
    assert store.get_or_import_refiner(str(refiner), check_files=refuse_unusable)
    result = CliRunner().invoke(main, ["inspect", str(refiner)])
    assert "can be served:     with --refiner" in result.output
    file = next((refiner / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    del tensors["conv_out.bias"]
    save_file(tensors, file)
    message = error_message(store.get_or_import_refiner, str(refiner), check_files=refuse_unusable)
    assert "'conv_out.bias'" in message
    assert len(store.list_models()) == 1


def test_models_are_removed_by_their_tags(tmp_path: Path) -> None:
    folder = save_sd(tmp_path / "model")
    tag = store.get_or_import(str(folder)).tag
    result = CliRunner().invoke(main, ["remove", tag])
    assert (result.exit_code, result.output) == (0, f"{tag}\n")
    assert not store.list_models()
    assert list((folder / "unet").glob("*.safetensors"))
    for unknown in (tag, "model", "../model:1", ":"):
        message = str(CliRunner().invoke(main, ["remove", unknown]).exception)
        assert message == f"No model '{unknown}' in the store; it is empty."


@pytest.mark.parametrize("is_file", [True, False])
def test_a_model_that_cannot_be_loaded_does_not_stay_in_the_store(tmp_path: Path, is_file: bool) -> None:
    file, configuration, folder = LAYOUTS["SDXL"].build(tmp_path)
    broken = file if is_file else next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(broken)
    name = next(
        name for name in tensors if name.endswith("time_embed.0.bias" if is_file else "linear_1.bias")
    )
    del tensors[name]
    save_file(tensors, broken)
    source = str(file if is_file else folder)
    config = str(configuration) if is_file else None
    message = error_message(
        store.get_or_import, source, single_file_config=config, check_files=refuse_unusable
    )
    assert f"'{name}'" in message
    assert not store.list_models()
