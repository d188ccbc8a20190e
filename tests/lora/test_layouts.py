"""LoRA files in the layouts that are published for SDXL and FLUX, against diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hypergen.errors import ConfigurationError, SettingError
from hypergen.lora.manager import LoraManager, lora_context
from tests.support.lora_files import random_lora
from tests.support.lora_networks import flux, noise, run_flux, run_sdxl, sdxl
from tests.support.sync_engine import make_settings

State = dict[str, Tensor]


def _pair(name: str, out: int, inside: int, rank: int, alpha: float, seed: int) -> State:
    return {
        f"{name}.lora_down.weight": noise(rank, inside, seed=seed) * 0.3,
        f"{name}.lora_up.weight": noise(out, rank, seed=seed + 1) * 0.3,
        f"{name}.alpha": torch.tensor(alpha),
    }


def _sdxl_peft(pipeline: Any) -> State:
    second = random_lora(pipeline.text_encoder_2, 4, ["q_proj"], 2, 1.0)
    state = {f"unet.{key}": v for key, v in random_lora(pipeline.unet, 4, ["to_q", "to_k"], 1).items()}
    return {**state, **{f"text_encoder_2.{key}": value for key, value in second.items()}}


def _sdxl_kohya(_: Any) -> State:
    """Blocks counted as in the original code, all ranks and alphas different, both text encoders."""
    block = "lora_unet_input_blocks_4_1_transformer_blocks_0_"
    text = "text_model_encoder_layers_0_"
    return {
        **_pair(f"{block}attn1_to_q", 32, 32, 4, 2.0, 1),
        **_pair(f"{block}ff_net_2", 32, 128, 8, 8.0, 3),
        **_pair("lora_unet_output_blocks_0_1_proj_in", 32, 32, 16, 1.0, 5),
        **_pair(f"lora_te1_{text}mlp_fc1", 64, 32, 4, 4.0, 7),
        **_pair(f"lora_te1_{text}self_attn_out_proj", 32, 32, 4, 4.0, 11),
        **_pair(f"lora_te2_{text}self_attn_out_proj", 32, 32, 4, 4.0, 9),
    }


def _flux_peft(pipeline: Any) -> State:
    state = random_lora(
        pipeline.transformer, 4, ["to_q", "add_k_proj", "proj_mlp", "norm1.linear", "linear_1"], 1
    )
    return {f"transformer.{key}": value for key, value in state.items()}


def _flux_kohya(_: Any) -> State:
    """Fused query, key and value, which are separate layers of the model."""
    return {
        **_pair("lora_unet_double_blocks_0_img_attn_qkv", 96, 32, 4, 2.0, 1),
        **_pair("lora_unet_double_blocks_0_txt_mlp_0", 128, 32, 8, 8.0, 3),
        **_pair("lora_unet_single_blocks_0_linear2", 32, 32 + 128, 4, 1.0, 5),
    }


CASES = {
    "sdxl, diffusers": (sdxl, run_sdxl, _sdxl_peft),
    "sdxl, kohya": (sdxl, run_sdxl, _sdxl_kohya),
    "flux, diffusers": (flux, run_flux, _flux_peft),
    "flux, kohya": (flux, run_flux, _flux_kohya),
}


@pytest.mark.parametrize(("make", "run", "state"), CASES.values(), ids=CASES.keys())
@torch.inference_mode()
def test_a_lora_changes_each_network_as_in_diffusers(make: Any, run: Any, state: Any, tmp_path: Path) -> None:
    pipeline = make()
    file = tmp_path / "style.safetensors"
    save_file({key: value.contiguous() for key, value in state(pipeline).items()}, file)
    lora_manager = LoraManager(pipeline, make_settings(lora=[f"style={file}"]))
    base = run(pipeline)
    loras = lora_manager.load((("style", 0.7),))
    with lora_context(lora_manager, [loras]):
        ours = run(pipeline)
    assert all(torch.equal(one, other) for one, other in zip(run(pipeline), base, strict=True))

    pipeline.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="style")
    pipeline.set_adapters(["style"], [0.7])
    for one, stock, plain in zip(ours, run(pipeline), base, strict=True):
        torch.testing.assert_close(one, stock, rtol=1e-4, atol=1e-4)
        assert torch.equal(stock, plain) == torch.equal(one, plain)
    assert not torch.allclose(ours[0], base[0], atol=1e-2)


def test_unsupported_combinations_with_loras_are_an_error(tmp_path: Path) -> None:
    pipeline = sdxl()
    folder = make_settings(lora_dir=[str(tmp_path)], offload="model")
    with pytest.raises(ConfigurationError, match="with --offload"):
        LoraManager(pipeline, folder)
    assert LoraManager(pipeline, make_settings(offload="model")).info_fields()["max_loras"] == 0
    with pytest.raises(ConfigurationError, match="by object"):
        LoraManager(object(), make_settings(lora_dir=[str(tmp_path)]))


def test_a_lora_of_another_family_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "flux.safetensors"
    save_file(_flux_peft(flux()), file)
    with pytest.raises(SettingError, match=r"'flux' cannot be applied: 'transformer\..*no such layer"):
        LoraManager(sdxl(), make_settings(lora=[str(file)]))
