"""LoRAs that change more than products, on the fake CUDA device: images equal those of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from hypergen.lora.accelerator_batch import AcceleratorLoraBatch
from hypergen.lora.batched_lora import Loras, add_row
from hypergen.lora.slots import joined
from hypergen.lora.weights import LayerWeights, Lora, LoraFile
from hypergen.request import GenerationRequest
from tests.support.compare_devices import assert_close, load_loras, make_engine, pixels
from tests.support.fake_cuda import fake_cuda
from tests.support.lora_files import ATTENTION, EVERYTHING, random_lora, save_lora
from tests.support.sync_engine import InlineEngine, make_request

_CHANGES = ("bias", "norms", "text norms", "inputs", "embedding")
# Of the rows of one batch.
_MIXED: list[tuple[tuple[str, float], ...]] = [
    (),
    (("plain", 0.7),),
    *(((name, 0.8),) for name in _CHANGES),
    (("bias", 0.5), ("inputs", 0.4), ("norms", 0.6), ("plain", -0.5)),
]


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.3


def _of_unet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"unet.{key}": tensor for key, tensor in state.items()}


def _with_biases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ups = {key: up for key, up in state.items() if key.endswith("lora_B.weight")}
    return state | {key.replace("B.weight", "B.bias"): _noise(len(up)) for key, up in ups.items()}


def _with_magnitudes_of_inputs(state: dict[str, Tensor], unet: nn.Module) -> dict[str, Tensor]:
    """Kohya's layout, in which a DoRA has the norms of a layer's inputs or of its outputs."""
    changed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name, _, part = key.partition(".lora_")
        layer = f"lora_unet_{name.replace('.', '_')}"
        changed[f"{layer}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = tensor
        weight = unet.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        norms = weight.detach().transpose(0, 1).flatten(1).norm(dim=1)
        changed[f"{layer}.dora_scale"] = norms.view(1, -1, *[1] * (weight.dim() - 2)) * 1.2
    return changed


def _norms(network: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}{name.replace('.', '_')}.{part}": _noise(*module.weight.shape)
        for name, module in network.named_modules()
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm))
        for part in ("w_norm", "b_norm")
    }


@pytest.fixture(scope="module")
def lora_files(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    folder = tmp_path_factory.mktemp("loras")
    torch.manual_seed(0)
    # Products that change little, so that an image shows the other changes.
    attention, everything = (
        random_lora(pipeline.unet, 4, targets, seed=1, strength=0.01) for targets in (ATTENTION, EVERYTHING)
    )
    states = {
        "bias": _of_unet(_with_biases(everything)),
        "norms": _of_unet(attention) | _norms(pipeline.unet, "lora_unet_"),
        "text norms": _norms(pipeline.text_encoder, "lora_te_"),
        "inputs": _with_magnitudes_of_inputs(everything, pipeline.unet),
        "embedding": {"bundle_emb.toy.emb_params": _noise(3, pipeline.text_encoder.config.hidden_size)},
    }
    for name, state in states.items():
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / f"{name}.safetensors")
    save_lora(folder / "plain.safetensors", pipeline, rank=4, targets=EVERYTHING, seed=3)
    return folder


def _request(loras: tuple[tuple[str, float], ...]) -> GenerationRequest:
    return make_request(prompt="a toy cat", loras=loras, num_inference_steps=2)


@pytest.fixture(scope="module")
def engines(sd_folder: Path, lora_files: Path) -> Iterator[tuple[InlineEngine, InlineEngine]]:
    """On the CPU and on the fake device; each test generates its images alone."""
    cpu = make_engine(sd_folder, "cpu", lora_dir=(lora_files,))
    with fake_cuda():
        engines = cpu, make_engine(sd_folder, "cuda", lora_dir=(lora_files,))
        yield engines
        for engine in engines:
            engine.engine.close()


@pytest.mark.parametrize("name", _CHANGES)
def test_an_image_is_that_of_the_cpu(engines: tuple[InlineEngine, InlineEngine], name: str) -> None:
    request, base = _request(((name, 0.8),)), _request(())
    cpu, accelerator = engines
    cpu.generate(request, base)
    assert np.abs(pixels(cpu, request) - pixels(cpu, base)).max() > 5
    accelerator.generate(request)
    assert not accelerator.errors
    assert_close(accelerator, cpu, request)


def test_an_image_is_that_of_the_cpu_in_a_batch_with_others(
    engines: tuple[InlineEngine, InlineEngine], sd_folder: Path, lora_files: Path
) -> None:
    requests = [_request(loras) for loras in _MIXED]
    cpu, alone = engines
    cpu.generate(*requests)
    batched = make_engine(sd_folder, "cuda", lora_dir=(lora_files,))
    batched.probe_shapes(requests[0])
    loaded = load_loras(batched, "plain", *_CHANGES)
    batched.run(*requests)
    assert not batched.errors
    assert len(loaded) == 1 + len(_CHANGES)
    for request in requests:
        alone.generate(request)
        assert not alone.errors
        assert batched.images[request.id][0].shared_forwards
        assert alone.data(request) == batched.data(request), request.loras
        assert_close(batched, cpu, request)


def test_factors_of_a_convolution_that_are_too_large_are_gathered_in_parts() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 32, 3, stride=2, padding=1)
    down, up = torch.randn(4096, 64, 3, 3) / 100, torch.randn(32, 4096) / 100
    large = Lora(LoraFile({"layer": joined(LayerWeights(down, up), 32)}), "large")
    small = Lora(LoraFile({"layer": joined(LayerWeights(down[:8], up[:, :8]), 32)}), "small")
    row_bytes = (down.numel() + up.numel()) * 4
    rows: list[Loras] = [((large, 0.5),), (), ((small, -1.0),), ((large, 1.0), (small, 1.0))] * 8
    assert len(rows) * row_bytes > 2**28
    x = torch.randn(len(rows), 64, 6, 6)
    expected = layer(x).detach()
    output = expected.clone()
    with torch.inference_mode():
        for row, own in enumerate(rows):
            for lora, weight in own:
                add_row(layer, lora.layers["layer"], row, weight, x, expected)
        for batch in (rows, rows[:1] * len(rows)):
            result = output.clone()
            AcceleratorLoraBatch(batch, torch.device("cpu"), {}).add(layer, "layer", x, result)
            for row, own in enumerate(batch):
                if own == rows[row]:
                    torch.testing.assert_close(result[row], expected[row], rtol=1e-4, atol=1e-4)
