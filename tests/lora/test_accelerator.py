"""LoRAs that change more than products, on the fake CUDA device: images equal those of the CPU."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from hypergen.models import loading
from hypergen.request import GenerationRequest
from tests.support.fake_cuda import fake_cuda
from tests.support.lora_files import ATTENTION, EVERYTHING, random_lora, save_lora
from tests.support.sync_engine import InlineEngine, make_request, make_settings

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
    return make_request(prompt="a toy cat", loras=loras)


def _engine(folder: Path, lora_files: Path, device: str) -> InlineEngine:
    settings: dict[str, Any] = {"device": device, "lora_dir": (lora_files,)}
    return InlineEngine(loading.load(folder, make_settings(**settings)), **settings)


def _pixels(engine: InlineEngine, request: GenerationRequest) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(engine.data(request)))).astype(int)


def _assert_close(accelerator: InlineEngine, cpu: InlineEngine, request: GenerationRequest) -> None:
    assert np.abs(_pixels(accelerator, request) - _pixels(cpu, request)).max() <= 1, request.loras


@pytest.mark.parametrize("name", _CHANGES)
def test_an_image_is_that_of_the_cpu(sd_folder: Path, lora_files: Path, name: str) -> None:
    request, base = _request(((name, 0.8),)), _request(())
    cpu = _engine(sd_folder, lora_files, "cpu")
    cpu.run(request, base)
    assert np.abs(_pixels(cpu, request) - _pixels(cpu, base)).max() > 5
    with fake_cuda():
        accelerator = _engine(sd_folder, lora_files, "cuda")
        accelerator.run(request)
    assert not accelerator.errors
    _assert_close(accelerator, cpu, request)


def test_an_image_is_that_of_the_cpu_in_a_batch_with_others(sd_folder: Path, lora_files: Path) -> None:
    requests = [_request(loras) for loras in _MIXED]
    cpu = _engine(sd_folder, lora_files, "cpu")
    cpu.run(*requests)
    with fake_cuda():
        batched = _engine(sd_folder, lora_files, "cuda")
        batched.probe_shapes(requests[0])
        batched.run(*requests)
        assert not batched.errors
        alone = _engine(sd_folder, lora_files, "cuda")
        for request in requests:
            alone.submit(request)
            while request.id not in alone.images:
                alone.step(0.01)
                assert not alone.errors
        alone.engine.close()
    for request in requests:
        assert batched.images[request.id][0].shared_forwards
        assert alone.data(request) == batched.data(request), request.loras
        _assert_close(batched, cpu, request)
