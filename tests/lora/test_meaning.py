"""Every layout of LoRA files: what is applied equals what the file means, layer by layer and in outputs.

A file that is not wholly understood is refused, with the name of the tensor or field.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hypergen.engine.reordered_weights import reorder_weights
from hypergen.errors import InvalidRequestError
from hypergen.lora.manager import LoraManager, lora_context
from tests.support.lora_forms import KOHYA, Layout, State, diff, merge, write
from tests.support.lora_layouts import LAYOUTS
from tests.support.lora_networks import MODELS, flux, run_sdxl, sdxl
from tests.support.sync_engine import make_settings


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@torch.inference_mode()
def test_a_file_changes_each_layer_as_it_means(layout: Layout, tmp_path: Path) -> None:
    make, run = MODELS[layout.model]
    pipeline: Any = make()
    file = tmp_path / "style.safetensors"
    meaning = write(layout, file, pipeline)
    lora_manager = LoraManager(pipeline, make_settings(lora=[f"style={file}"]))
    loras = lora_manager.load((("style", 0.7),))

    [(lora, _)] = loras
    assert {*lora.layers, *lora.norms} == {*meaning.weights, *meaning.biases}
    for name, weights in lora.layers.items():
        expected = meaning.weights.get(name)
        delta = (weights.up @ weights.down.flatten(1)).flatten()
        torch.testing.assert_close(
            delta, torch.zeros_like(delta) if expected is None else expected.flatten(), rtol=1e-5, atol=1e-5
        )
        assert (weights.bias is None) == (name not in meaning.biases)
        if weights.bias is not None:
            torch.testing.assert_close(weights.bias, meaning.biases[name])
    for name, norm in lora.norms.items():
        torch.testing.assert_close(norm.weight, meaning.weights[name])
        torch.testing.assert_close(norm.bias, meaning.biases.get(name, torch.zeros_like(norm.bias)))

    base = run(pipeline)
    with lora_context(lora_manager, [loras]):
        ours = run(pipeline)
    assert all(torch.equal(one, other) for one, other in zip(run(pipeline), base, strict=True))
    merged = make()
    merge(merged, meaning, 0.7)
    changes: list[float] = []
    for one, expected, plain in zip(ours, run(merged), base, strict=True):
        changes.append(float((expected - plain).abs().max()))
        assert (one - expected).abs().max() <= 0.01 * changes[-1]
    assert max(changes) > 1e-3


@pytest.mark.parametrize("axis", ["outputs", "inputs"])
@pytest.mark.parametrize(
    "layer", ["mid_block.attentions.0.transformer_blocks.0.ff.net.2", "mid_block.resnets.0.conv1", "conv_in"]
)
@pytest.mark.parametrize("reordered", [False, True])
@torch.inference_mode()
def test_a_dora_of_kohyas_scripts_scales_the_whole_weight(
    layer: str, axis: str, reordered: bool, tmp_path: Path
) -> None:
    pipeline, merged = sdxl(), sdxl()
    file = tmp_path / "style.safetensors"
    name = f"lora_unet_{layer.replace('.', '_')}"
    meaning = write(Layout("sdxl", KOHYA, {name: (f"unet.{layer}",)}), file, pipeline)
    weight: Any = merged.unet.get_submodule(layer).weight
    # The norms of outputs, or of inputs: the file has the dimension that it does not sum over.
    summed = tuple(d for d in range(weight.dim()) if d != (0 if axis == "outputs" else 1))
    scale = _norm(weight, summed) * 1.5
    save_file({**load_file(file), f"{name}.dora_scale": scale}, file)
    changed = weight + 0.7 * meaning.weights[f"unet.{layer}"]
    weight.copy_(changed * scale / _norm(changed, summed))

    if reordered:  # as engines do on a CPU
        reorder_weights(pipeline.unet)
        run_sdxl(pipeline)
    lora_manager = LoraManager(pipeline, make_settings(lora=[f"style={file}"]))
    with lora_context(lora_manager, [lora_manager.load((("style", 0.7),))]):
        ours = run_sdxl(pipeline)[0]
    torch.testing.assert_close(ours, run_sdxl(merged)[0], rtol=1e-3, atol=1e-4)


def _norm(weight: Tensor, dimensions: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=dimensions, keepdim=True)


_PAIR = {
    "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
    "unet.conv_in.lora_B.weight": torch.ones(16, 2, 1, 1),
}
_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
_REFUSED: dict[str, tuple[State, dict[str, str], dict[str, Any], str]] = {
    "a layer of no network": (
        {"unet.nothing.lora_A.weight": torch.ones(2, 2)},
        {},
        {},
        "'unet.nothing.lora_A",
    ),
    "a tensor of no LoRA": ({"unet.conv_in.weight": torch.ones(2)}, {}, {}, "'unet.conv_in.weight'"),
    "a set weight": ({"diffusion_model.conv_in.set_weight": torch.ones(2)}, {}, {}, r"conv_in\.set_weight'"),
    "an unused part": (
        {"unet.conv_in.lora_mid.weight": torch.ones(2, 2, 3, 3)},
        {},
        {},
        "differ: 'unet.conv_in'",
    ),
    "alpha alone": ({"unet.conv_out.alpha": torch.ones(())}, {}, {}, "incomplete .* 'unet.conv_out'"),
    "GLoRA": ({"lora_unet_conv_in.a1.weight": torch.ones(2)}, {}, {}, "'lora_unet_conv_in.a1.weight'"),
    "half a LoHa": ({"lora_unet_conv_out.hada_w1_a": torch.ones(4, 2)}, {}, {}, "'lora_unet_conv_out'"),
    "two different changes": (
        {
            "lora_unet_conv_in.lora_down.weight": torch.ones(1, 4, 3, 3),
            "lora_unet_conv_in.lora_up.weight": torch.ones(16, 1),
        },
        {},
        {},
        "two different changes of the same layer: 'unet.conv_in'",
    ),
    "two changes, one with a bias": (
        {
            "lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 3, 3),
            "lora_unet_conv_in.lora_up.weight": torch.ones(16, 2),
            "lora_unet_conv_in.diff_b": torch.ones(16),
        },
        {},
        {},
        "two different changes of the same layer: 'unet.conv_in'",
    ),
    "a norm with factors": (
        {
            "unet.conv_norm_out.lora_A.weight": torch.ones(1, 16),
            "unet.conv_norm_out.lora_B.weight": torch.ones(16, 1),
        },
        {},
        {},
        "'unet.conv_norm_out'",
    ),
    "another base model": (
        {},
        {"ss_base_model_version": "sd_v1"},
        {},
        "ss_base_model_version is 'sd_v1'.* sdxl",
    ),
    "another architecture": ({}, {"modelspec.architecture": "flux-1-dev/lora"}, {}, "is 'flux-1-dev/lora'"),
    "another type of PEFT": ({}, {}, {"peft_type": "VERA"}, "peft_type VERA"),
    "changed base weights": ({}, {}, {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa"),
    "DoRA without magnitudes": ({}, {}, {"use_dora": True}, "use_dora"),
    "another rank": ({}, {}, {"r": 4}, "rank 2, but 4 in its configuration: 'base_model.model.conv_in'"),
}


@pytest.mark.parametrize(("extra", "header", "config", "message"), _REFUSED.values(), ids=_REFUSED.keys())
def test_a_file_that_is_not_wholly_understood_is_refused_by_name(
    extra: State, header: dict[str, str], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    prefix = "base_model.model." if config else "unet."
    good = {key.replace("unet.", prefix): tensor for key, tensor in _PAIR.items()}
    if config:
        (tmp_path / "adapter_config.json").write_text(json.dumps({**_CONFIG, **config}))
    file = tmp_path / "adapter_model.safetensors"
    save_file(good, file)
    lora_manager = LoraManager(sdxl(), make_settings(lora_dir=[str(tmp_path)]))
    if not config:
        lora_manager.load((("adapter_model", 1.0),))
    save_file({**good, **extra}, file, header or None)
    with pytest.raises(InvalidRequestError, match=message) as refused:
        lora_manager.load((("adapter_model", 1.0),))
    assert refused.value.param == "loras"


def test_two_equal_changes_of_a_layer_are_applied_once(tmp_path: Path) -> None:
    again = {
        key.replace("unet.conv_in", "diffusion_model.input_blocks.0.0"): t + 0 for key, t in _PAIR.items()
    }
    save_file({**_PAIR, **again}, tmp_path / "style.safetensors")
    lora_manager = LoraManager(sdxl(), make_settings(lora_dir=[str(tmp_path)]))
    [(lora, _)] = lora_manager.load((("style", 1.0),))
    assert [weights.up.sum().item() for weights in lora.layers.values()] == [32.0]


def test_a_small_file_with_large_factors_is_refused(tmp_path: Path) -> None:
    pipeline = sdxl()
    write(
        Layout("sdxl", diff, {"lora_unet_conv_in": ("unet.conv_in",)}),
        tmp_path / "style.safetensors",
        pipeline,
    )
    lora_manager = LoraManager(pipeline, make_settings(lora_dir=[str(tmp_path)], max_lora_mb=0.003))
    with pytest.raises(InvalidRequestError, match=r"factors of more than"):
        lora_manager.load((("style", 1.0),))


def test_pefts_folder_is_a_lora_and_a_changed_configuration_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "style"
    folder.mkdir()
    good = {key.replace("unet.", "base_model.model."): tensor for key, tensor in _PAIR.items()}
    save_file(good, folder / "adapter_model.safetensors")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(_CONFIG))
    lora_manager = LoraManager(sdxl(), make_settings(lora=[f"ink={folder}"]))
    sums: list[float] = []
    for alpha in (2, 16):
        config.write_text(json.dumps({**_CONFIG, "lora_alpha": alpha}))
        [(lora, _)] = lora_manager.load((("ink", 1.0),))
        sums.append(lora.layers["unet.conv_in"].up.sum().item())
    assert sums == [32.0, 256.0]


@pytest.mark.parametrize("make", [sdxl, flux])
def test_no_two_layers_have_the_same_name(make: Any) -> None:
    pipeline = make()
    for component in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        network = getattr(pipeline, component, None)
        paths = [path for path, _ in network.named_modules()] if network else []
        assert len({path.replace(".", "_") for path in paths}) == len(paths)


_HUGE = 200_000  # a product of two such sides would take 160 GB
_FACTORS: dict[str, dict[str, list[int]]] = {
    "LoHa of two ranks": {
        "hada_w1_a": [16, 2],
        "hada_w1_b": [3, 36],
        "hada_w2_a": [16, 3],
        "hada_w2_b": [2, 36],
    },
    "LoKr of two ranks": {
        "lokr_w1_a": [4, 2],
        "lokr_w1_b": [3, 2],
        "lokr_w2_a": [4, 3],
        "lokr_w2_b": [2, 18],
    },
    "huge core of LoRA": {"lora_down": [1, _HUGE], "lora_mid": [_HUGE, 1, 1, 1], "lora_up": [16, _HUGE]},
    "huge core of LoHa": {
        "hada_t1": [1, 1, 3, 3],
        "hada_w1_a": [1, _HUGE],
        "hada_w1_b": [1, _HUGE],
        "hada_t2": [1, 1, 3, 3],
        "hada_w2_a": [1, _HUGE],
        "hada_w2_b": [1, _HUGE],
    },
    "huge core of LoKr": {
        "lokr_w1": [4, 2],
        "lokr_t2": [1, 1, 3, 3],
        "lokr_w2_a": [1, _HUGE],
        "lokr_w2_b": [1, 2],
    },
    "huge side of LoKr": {"lokr_w1": [4, 2], "lokr_w2": [_HUGE, 1, 1, 1]},
}


@pytest.mark.parametrize("shapes", _FACTORS.values(), ids=_FACTORS.keys())
def test_factors_of_wrong_shapes_are_refused_before_they_are_multiplied(
    shapes: dict[str, list[int]], tmp_path: Path
) -> None:
    name = "lora_unet_conv_in"
    state = {f"{name}.{part}": torch.ones(shape) for part, shape in shapes.items()}
    save_file(state, tmp_path / "style.safetensors")
    lora_manager = LoraManager(sdxl(), make_settings(lora_dir=[str(tmp_path)]))
    with pytest.raises(InvalidRequestError, match=f"the shapes of its layers differ: '{name}'"):
        lora_manager.load((("style", 1.0),))
