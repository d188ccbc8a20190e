"""`hypergen inspect` and the check at an import: what cannot be served is refused and does not stay."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from hypergen.cli.main import main
from hypergen.errors import ModelError
from hypergen.model_store import store
from hypergen.model_store.model_check import refuse_unusable
from tests.support.checkpoint_layouts import LAYOUTS, REFUSED
from tests.support.model_folders import error_message


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


def test_a_folder_is_checked(tmp_path: Path) -> None:
    folder = LAYOUTS["SDXL"].save(tmp_path / "model")
    assert "can be served:     yes" in CliRunner().invoke(main, ["inspect", str(folder)]).output
    file = next((folder / "vae").glob("*.safetensors"))
    save_file({**load_file(file), "surplus": load_file(file)["decoder.conv_in.bias"]}, file)
    result = CliRunner().invoke(main, ["inspect", str(folder)])
    assert isinstance(result.exception, ModelError)
    assert "'surplus'" in str(result.exception)


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
