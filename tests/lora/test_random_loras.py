"""Random LoRAs: every way to write one down is read as the same changes of the same layers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hypergen.lora.layer_names import LayerNames
from hypergen.lora.weights import read_lora
from tests.support.lora_networks import flux, sdxl

# Down, shape (rank, in, ...), up, shape (out, rank, ...), and alpha.
_Layer = tuple[Tensor, Tensor, float]

_SDXL = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "down_blocks.0.resnets.1.conv2": "input_blocks.2.0.out_layers.3",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.attentions.1.proj_in": "input_blocks.5.1.proj_in",
    "down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k": (
        "input_blocks.7.1.transformer_blocks.0.attn2.to_k"
    ),
    "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": (
        "middle_block.1.transformer_blocks.0.ff.net.0.proj"
    ),
    "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0": (
        "output_blocks.5.1.transformer_blocks.0.attn1.to_out.0"
    ),
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.2.resnets.0.conv_shortcut": "output_blocks.6.0.skip_connection",
}
_FLUX = {
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "transformer_blocks.0.attn.to_out.0": "double_blocks.0.img_attn.proj",
    "transformer_blocks.0.attn.to_add_out": "double_blocks.0.txt_attn.proj",
    "transformer_blocks.0.ff.net.0.proj": "double_blocks.0.img_mlp.0",
    "transformer_blocks.0.norm1_context.linear": "double_blocks.0.txt_mod.lin",
    "single_transformer_blocks.0.norm.linear": "single_blocks.0.modulation.lin",
    "single_transformer_blocks.0.proj_out": "single_blocks.0.linear2",
}
_MODELS: dict[str, tuple[Callable[[], Any], str, dict[str, str]]] = {
    "sdxl": (sdxl, "unet", _SDXL),
    "flux": (flux, "transformer", _FLUX),
}

# Component, diffusers' path and the original one -> the name of the layer.
_NAMES: dict[str, Callable[[str, str, str], str]] = {
    "diffusers": lambda component, path, original: f"{component}.{path}",
    "PEFT": lambda component, path, original: f"base_model.model.{path}",
    "PEFT, original": lambda component, path, original: f"base_model.model.{original}",
    "ComfyUI": lambda component, path, original: f"diffusion_model.{original}",
    "checkpoint": lambda component, path, original: f"model.diffusion_model.{original}",
    "component, original": lambda component, path, original: f"{component}.{original}",
    "Kohya": lambda component, path, original: f"lora_unet_{original.replace('.', '_')}",
    "Kohya, diffusers": lambda component, path, original: f"lora_unet_{path.replace('.', '_')}",
    "OneTrainer": lambda component, path, original: f"lora_{component}_{path.replace('.', '_')}",
    "LyCORIS": lambda component, path, original: f"lycoris_{path.replace('.', '_')}",
    "bare": lambda component, path, original: path,
}


def _with_alpha(down: str, up: str) -> Callable[[str, _Layer], dict[str, Tensor]]:
    return lambda name, layer: {
        f"{name}{down}": layer[0],
        f"{name}{up}": layer[1],
        f"{name}.alpha": torch.tensor(layer[2]),
    }


def _folded(down: str, up: str) -> Callable[[str, _Layer], dict[str, Tensor]]:
    return lambda name, layer: {
        f"{name}{down}": layer[0],
        f"{name}{up}": layer[1] * (layer[2] / layer[0].shape[0]),
    }


def _difference(name: str, layer: _Layer) -> dict[str, Tensor]:
    return {f"{name}.diff": _delta(layer)}


def _lokr(name: str, layer: _Layer) -> dict[str, Tensor]:
    return {f"{name}.lokr_w1": torch.ones(1, 1), f"{name}.lokr_w2": _delta(layer)}


_ENDINGS: dict[str, Callable[[str, _Layer], dict[str, Tensor]]] = {
    "PEFT": _folded(".lora_A.weight", ".lora_B.weight"),
    "PEFT, default": _folded(".lora_A.default.weight", ".lora_B.default.weight"),
    "PEFT and alpha": _with_alpha(".lora_A.weight", ".lora_B.weight"),
    "Kohya": _with_alpha(".lora_down.weight", ".lora_up.weight"),
    "Kohya without alpha": _folded(".lora_down.weight", ".lora_up.weight"),
    "diffusers before PEFT": _folded(".lora.down.weight", ".lora.up.weight"),
    "diffusers' linear layers": _folded(".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "attention processors": _folded("_lora.down.weight", "_lora.up.weight"),
    "difference": _difference,
    "LoKr": _lokr,
}


def _delta(layer: _Layer) -> Tensor:
    down, up, alpha = layer
    product = up.flatten(1) @ down.flatten(1) * (alpha / down.shape[0])
    return product.reshape(up.shape[0], *down.shape[1:])


def _random_lora(component: Any, paths: list[str], seed: int) -> dict[str, _Layer]:
    """Some layers, each with a rank, an alpha and matrices of its own."""
    chosen, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    layers: dict[str, _Layer] = {}
    for path in chosen.sample(paths, chosen.randint(1, len(paths))):
        shape = component.get_submodule(path).weight.shape
        rank = chosen.randint(1, 6)
        layers[path] = (
            torch.randn(rank, *shape[1:], generator=generator),
            torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator),
            chosen.choice([0.5, 1.0, 4.0, 16.0]),
        )
    return layers


@pytest.fixture(scope="module", params=_MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    make, component, names = _MODELS[request.param]
    pipeline = make()
    return LayerNames(pipeline), component, getattr(pipeline, component), names


@pytest.mark.parametrize("ending", _ENDINGS.values(), ids=_ENDINGS.keys())
@pytest.mark.parametrize("naming", _NAMES.values(), ids=_NAMES.keys())
def test_a_random_lora_is_the_same_in_every_layout(
    model: Any, naming: Any, ending: Any, tmp_path: Path
) -> None:
    layer_names, component, network, originals = model
    for seed in range(3):
        lora = _random_lora(network, list(originals), seed)
        state: dict[str, Tensor] = {}
        for path, layer in lora.items():
            state |= ending(naming(component, path, originals[path]), layer)
        file = tmp_path / "style.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)
        read = read_lora(file, layer_names, frozenset(), {}, 1e9)
        assert read.layers.keys() == {f"{component}.{path}" for path in lora}
        for path, layer in lora.items():
            weights, expected = read.layers[f"{component}.{path}"], _delta(layer)
            delta = (weights.up @ weights.down.flatten(1)).reshape(expected.shape)
            torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-4)
